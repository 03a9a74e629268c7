"""The heat map of `loramix explain --plot`: a panel an adapter and measure, layers across, kinds of module down."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merging.errors import OutputError
from merging.report import ModuleReport, Overlap

_RANGES = {"energy": (0, 1, "viridis"), "cosine": (-1, 1, "RdBu"), "shared": (0, 1, "magma")}


def check_plot(path: Path) -> None:
    """Raise OutputError where no picture can be drawn to `path`: known before the work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("--plot needs matplotlib: pip install 'loramix[plot]'")
    if path.suffix != ".png":
        raise OutputError(f"{path} is no name for a PNG; call it {path.with_suffix('.png')}")
    if not path.parent.is_dir():
        raise OutputError(f"no folder {path.parent} for {path.name}; make it, or choose another")


def draw(reports: Sequence[ModuleReport], names: Sequence[str], measures: Sequence[str], title: str, path: Path) -> None:
    """Write the picture of some of "energy", "cosine" and "shared" as a PNG. Raises OSError."""
    from matplotlib.figure import Figure  # an extra

    layers = sorted({report.layer for report in reports}, key=lambda layer: -1 if layer is None else layer)
    kinds = sorted({report.kind for report in reports})
    figure = Figure(
        figsize=(1.8 + len(measures) * max(2.8, 0.16 * len(layers)), 1.1 + len(names) * (0.5 + 0.24 * len(kinds))),
        layout="constrained",
    )
    panels = figure.subplots(len(names), len(measures), squeeze=False, sharex=True, sharey=True)
    for row, name in enumerate(names):
        for column, measure in enumerate(measures):
            low, high, colours = _RANGES[measure]
            panel = panels[row][column]
            cells = _cells(reports, name, measure, kinds, layers)
            image = panel.imshow(cells, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
            panel.set_title(f"{name}: {measure}", fontsize=9)
            panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
            shown = range(0, len(layers), max(1, len(layers) // 8))
            panel.set_xticks(list(shown), ["–" if layers[i] is None else str(layers[i]) for i in shown], fontsize=7)
            if row == 0:
                figure.colorbar(image, ax=list(panels[:, column]), shrink=0.8)
    for panel in panels[-1]:
        panel.set_xlabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _cells(
    reports: Sequence[ModuleReport], name: str, measure: str, kinds: Sequence[str], layers: Sequence[int | None]
) -> NDArray[np.float64]:
    """(kinds, layers): the measure of one adapter; NaN where it has no modules."""
    overlaps: dict[tuple[int, int], Overlap] = {}
    for report in reports:
        if name in report.sources:
            place = kinds.index(report.kind), layers.index(report.layer)
            overlaps[place] = overlaps.get(place, Overlap()) + report.sources[name]
    cells = np.full((len(kinds), len(layers)), np.nan)
    for place, overlap in overlaps.items():
        cells[place] = getattr(overlap, measure)
    return cells
