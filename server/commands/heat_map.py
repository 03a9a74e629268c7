"""What the heat maps of `--plot` have in common: layers across, kinds of module down."""

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging.errors import OutputError
from merging.report import kind_of, layer_of


def check_plot(path: Path) -> None:
    """Raise OutputError where no picture can be drawn to `path`: known before the work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("--plot needs matplotlib: pip install 'loramix[plot]'")
    if path.suffix != ".png":
        raise OutputError(f"{path} is no name for a PNG; call it {path.with_suffix('.png')}")
    if not path.parent.is_dir():
        raise OutputError(f"no folder {path.parent} for {path.name}; make it, or choose another")


class Grid:
    """The rows and columns of a heat map.

    Attributes:
        layers: in order, modules of none (None) first; kinds: in order.
    """

    def __init__(self, modules: Collection[str]) -> None:
        self.layers = sorted({layer_of(module) for module in modules}, key=lambda layer: -1 if layer is None else layer)
        self.kinds = sorted({kind_of(module) for module in modules})

    def place(self, module: str) -> tuple[int, int]:
        """Row and column of a module."""
        return self.kinds.index(kind_of(module)), self.layers.index(layer_of(module))

    def empty(self) -> NDArray[np.float64]:
        """(kinds, layers), all NaN, which is drawn as nothing."""
        return np.full((len(self.kinds), len(self.layers)), np.nan)

    def height(self, panels: int) -> float:
        """Of a figure with so many panels one over another, in inches."""
        return 1.1 + panels * (0.5 + 0.24 * len(self.kinds))

    def draw(self, panel: Any, cells: NDArray[np.float64], title: str, colours: str, low: float, high: float) -> Any:
        """Fill a panel of matplotlib; the image, for a colour bar."""
        image = panel.imshow(cells, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
        panel.set_title(title, fontsize=9)
        panel.set_yticks(range(len(self.kinds)), self.kinds, fontsize=7)
        shown = range(0, len(self.layers), max(1, len(self.layers) // 8))
        panel.set_xticks(list(shown), [self._name(self.layers[i]) for i in shown], fontsize=7)
        return image

    @staticmethod
    def _name(layer: int | None) -> str:
        return "–" if layer is None else str(layer)


def save(figure: Any, bottom: Sequence[Any], title: str, path: Path) -> None:
    """Write the figure as a PNG, its lowest panels labelled. Raises OSError."""
    for panel in bottom:
        panel.set_xlabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
