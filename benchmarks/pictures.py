"""How the plots of a record become files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.errors import OutputError

Plot = Callable[[Any, Mapping[str, Any]], bool]


def draw(record: Mapping[str, Any], plots: Mapping[str, Plot], title: str, size: int, stem: Path) -> list[Path]:
    """Write `<stem>-<name>.png` for each of the plots that the record has figures for.

    Args:
        plots: by name; each draws on a figure of matplotlib, and says whether there was anything to draw.
        size: of the title, in points.

    Raises:
        OutputError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("plots need matplotlib: pip install 'loramix[plot]'") from error
    written = []
    for name, plot in plots.items():
        figure = Figure(figsize=(10, 4), layout="constrained")
        if plot(figure, record):
            figure.suptitle(title, fontsize=size)
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=150)
            written.append(path)
    return written
