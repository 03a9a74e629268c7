"""The heat map of `loramix explain --plot`: a panel an adapter and measure, layers across, kinds of module down."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merging.report import ModuleReport, Overlap
from server.commands.heat_map import Grid, save

_RANGES = {"energy": (0, 1, "viridis"), "cosine": (-1, 1, "RdBu"), "shared": (0, 1, "magma")}


def draw(reports: Sequence[ModuleReport], names: Sequence[str], measures: Sequence[str], title: str, path: Path) -> None:
    """Write the picture of some of "energy", "cosine" and "shared" as a PNG. Raises OSError."""
    from matplotlib.figure import Figure  # an extra

    grid = Grid([report.module for report in reports])
    width = 1.8 + len(measures) * max(2.8, 0.16 * len(grid.layers))
    figure = Figure(figsize=(width, grid.height(len(names))), layout="constrained")
    panels = figure.subplots(len(names), len(measures), squeeze=False, sharex=True, sharey=True)
    for row, name in enumerate(names):
        for column, measure in enumerate(measures):
            low, high, colours = _RANGES[measure]
            cells = _cells(reports, name, measure, grid)
            image = grid.draw(panels[row][column], cells, f"{name}: {measure}", colours, low, high)
            if row == 0:
                figure.colorbar(image, ax=list(panels[:, column]), shrink=0.8)
    save(figure, panels[-1], title, path)


def _cells(reports: Sequence[ModuleReport], name: str, measure: str, grid: Grid) -> NDArray[np.float64]:
    """(kinds, layers): the measure of one adapter; NaN where it has no modules."""
    overlaps: dict[tuple[int, int], Overlap] = {}
    for report in reports:
        if name in report.sources:
            place = grid.place(report.module)
            overlaps[place] = overlaps.get(place, Overlap()) + report.sources[name]
    cells = grid.empty()
    for place, overlap in overlaps.items():
        cells[place] = getattr(overlap, measure)
    return cells
