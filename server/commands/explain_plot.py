"""The heat map of `loramix explain --plot`: a panel an adapter and measure, layers across, kinds of module down."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from merging.errors import OutputError
from merging.report import ModuleReport, total


def draw(reports: Sequence[ModuleReport], names: Sequence[str], title: str, path: Path) -> None:
    """Write the picture; its format is that of the path's suffix. Raises OutputError without matplotlib, OSError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("--plot needs matplotlib: pip install 'loramix[plot]'") from error
    layers = sorted({report.layer for report in reports}, key=lambda layer: -1 if layer is None else layer)
    kinds = sorted({report.kind for report in reports})
    figure = Figure(
        figsize=(1.8 + 2 * max(2.8, 0.16 * len(layers)), 1.1 + len(names) * (0.5 + 0.24 * len(kinds))), layout="constrained"
    )
    panels = figure.subplots(len(names), 2, squeeze=False, sharex=True, sharey=True)
    for row, name in enumerate(names):
        for column, measure in enumerate(("energy", "cosine")):
            cells = np.full((len(kinds), len(layers)), np.nan)
            for y, kind in enumerate(kinds):
                for x, layer in enumerate(layers):
                    part = total([r for r in reports if r.kind == kind and r.layer == layer], name)
                    if part.units:
                        cells[y, x] = getattr(part, measure)
            low, colours = (0, "viridis") if measure == "energy" else (-1, "RdBu")
            panel = panels[row][column]
            image = panel.imshow(cells, vmin=low, vmax=1, cmap=colours, aspect="auto", interpolation="nearest")
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
