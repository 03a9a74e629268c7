"""The heat map of `loramix fit --plot`: a panel an adapter, layers across, kinds of module down."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from merging import Term
from server.commands.heat_map import Grid, save


def draw_weights(terms: Sequence[Term], modules: Mapping[str, Collection[str]], title: str, path: Path) -> None:
    """Write the terms' weights at the adapters' modules as a PNG; means where a layer has several of a kind. Raises OSError."""
    from matplotlib.figure import Figure  # an extra

    grid = Grid([module for names in modules.values() for module in names])
    figure = Figure(figsize=(2.4 + 0.2 * len(grid.layers), grid.height(len(terms))), layout="constrained")
    panels = figure.subplots(len(terms), squeeze=False, sharex=True)[:, 0]
    cells = {term.adapter: _cells(term, modules[term.adapter], grid) for term in terms}
    largest = max(float(np.nanmax(np.abs(values))) for values in cells.values())
    for panel, (name, values) in zip(panels, cells.items(), strict=True):
        image = grid.draw(panel, values, f"{name}: α", "RdBu", -largest, largest)
    figure.colorbar(image, ax=list(panels), shrink=0.8)
    save(figure, list(panels[-1:]), title, path)


def _cells(term: Term, modules: Collection[str], grid: Grid) -> NDArray[np.float64]:
    """(kinds, layers): the mean weight; NaN where the adapter has no modules."""
    weights: dict[tuple[int, int], list[float]] = {}
    for module in modules:
        weights.setdefault(grid.place(module), []).append(term.at(module))
    cells = grid.empty()
    for place, values in weights.items():
        cells[place] = fmean(values)
    return cells
