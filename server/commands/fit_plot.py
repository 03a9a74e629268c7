"""The heat map of `loramix fit --plot`: a panel an adapter, layers across, kinds of module down."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from merging import Term

_LAYER = re.compile(r"\.(\d+)\.")


def draw_weights(terms: Sequence[Term], modules: Mapping[str, Collection[str]], title: str, path: Path) -> None:
    """Write the terms' weights at the adapters' modules as a PNG; means where a layer has several of a kind. Raises OSError."""
    from matplotlib.figure import Figure  # an extra

    layers = sorted({layer_of(module) for names in modules.values() for module in names})
    kinds = sorted({kind_of(module) for names in modules.values() for module in names})
    figure = Figure(figsize=(2.4 + 0.2 * len(layers), 1.1 + len(terms) * (0.5 + 0.24 * len(kinds))), layout="constrained")
    panels = figure.subplots(len(terms), squeeze=False, sharex=True)[:, 0]
    cells = {term.adapter: _cells(term, modules[term.adapter], kinds, layers) for term in terms}
    largest = max(float(np.nanmax(np.abs(values))) for values in cells.values())
    for panel, (name, values) in zip(panels, cells.items(), strict=True):
        image = panel.imshow(values, vmin=-largest, vmax=largest, cmap="RdBu", aspect="auto", interpolation="nearest")
        panel.set_title(f"{name}: α", fontsize=9)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
        shown = range(0, len(layers), max(1, len(layers) // 8))
        panel.set_xticks(list(shown), ["–" if layers[i] < 0 else str(layers[i]) for i in shown], fontsize=7)
    panels[-1].set_xlabel("layer", fontsize=8)
    figure.colorbar(image, ax=list(panels), shrink=0.8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def layer_of(module: str) -> int:
    """The first number in a module's name, −1 if it has none."""
    layer = _LAYER.search(module)
    return int(layer[1]) if layer else -1


def kind_of(module: str) -> str:
    """The last part of a module's name, such as `q_proj`."""
    return module.rpartition(".")[2]


def _cells(term: Term, modules: Collection[str], kinds: Sequence[str], layers: Sequence[int]) -> np.ndarray:
    """(kinds, layers): the mean weight; NaN where the adapter has no modules."""
    sums, counts = np.zeros((2, len(kinds), len(layers)))
    for module in modules:
        place = kinds.index(kind_of(module)), layers.index(layer_of(module))
        sums[place] += term.at(module)
        counts[place] += 1
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)
