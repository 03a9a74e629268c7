"""One side of a pool's units (the A rows or the B columns), and the large operations on it; cuda_sides.py has the GPU's.

Shape suffixes as in pool.py; D is I or O.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merging.elementwise import Blend
from merging.room import Target

_PIECE_BYTES = 1 << 20  # of units in float32: what stays in a core's cache


class Side(Protocol):
    """The rows of T adapters for each of L modules, and where merged rows go: in the target's dtype, from float32 sums."""

    def gram(self, *, fine: bool) -> tuple[Tensor, Tensor]:
        """Inner products of the units, (L, N, N) float64, and their largest magnitudes, (L, N) float64.

        Args:
            fine: accumulate in float64, where the device does that at little cost (the CPU), instead of float32.
        """

    def peak_sign(self) -> Tensor:
        """(L, N) float64: the sign of each unit's entry of largest magnitude (the first of them), 0 for a unit of zeros."""

    def keep(self, scale_LN: Tensor) -> None:
        """Write the units, each times its scale."""

    def mix(self, t_LKN: Tensor, scale_LK: Tensor | None = None) -> None:
        """Write the mixtures T X, T in float64; each times its scale, float64, if given."""

    def peak_of_mix(self, t_LKN: Tensor) -> Tensor:
        """(L, K) float32: the largest magnitude of each mixture; the mixtures themselves are not kept."""

    def blend(self, blend: Blend, weight_LT: Tensor, key_LT: Tensor) -> None:
        """Write what `blend` makes of the adapters' entries; weights float32, keys int64."""


@dataclass(frozen=True)
class Rows:
    """Modules of one adapter's stack: factors (L, R, D) of `rows`, picked out only when they are worked on."""

    stack_LRD: Tensor
    rows: range | tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Tensor:
        rows = self.rows[part]
        return self.stack_LRD[rows.start : rows.stop] if isinstance(rows, range) else self.stack_LRD[list(rows)]


@dataclass(frozen=True)
class TorchSide:
    """In torch, a few modules at a time, so that what is brought together stays in the cache.

    Attributes:
        blocks: for each block of modules of one shape, those of T adapters.
        target: None where nothing is to be written.
    """

    blocks: tuple[tuple[Rows, ...], ...]
    target: Target | None = None

    def gram(self, *, fine: bool) -> tuple[Tensor, Tensor]:
        grams, peaks = [], []
        for _, x_LND in self._units(torch.float64 if fine else torch.float32):
            grams.append(x_LND @ x_LND.mT)
            peaks.append(x_LND.abs().amax(dim=2))
        return torch.cat(grams).double(), torch.cat(peaks).double()

    def peak_sign(self) -> Tensor:
        signs = []
        for _, x_LND in self._units(torch.float32):
            signs.append(x_LND.gather(2, x_LND.abs().argmax(dim=2, keepdim=True)).squeeze(2).sign())
        return torch.cat(signs).double()

    def keep(self, scale_LN: Tensor) -> None:
        scale_LN = scale_LN.float()
        for rows, x_LND in self._units(torch.float32):
            self._put(rows, scale_LN[rows, :, None] * x_LND)

    def mix(self, t_LKN: Tensor, scale_LK: Tensor | None = None) -> None:
        t_LKN = (t_LKN if scale_LK is None else scale_LK[:, :, None] * t_LKN).float()
        for rows, x_LND in self._units(torch.float32):
            self._put(rows, t_LKN[rows] @ x_LND)

    def peak_of_mix(self, t_LKN: Tensor) -> Tensor:
        t_LKN = t_LKN.float()
        return torch.cat([(t_LKN[rows] @ x_LND).abs().amax(dim=2) for rows, x_LND in self._units(torch.float32)])

    def blend(self, blend: Blend, weight_LT: Tensor, key_LT: Tensor) -> None:
        for rows, parts in self._pieces():
            self._put(rows, blend(parts, weight_LT[rows], key_LT[rows]))

    def _put(self, rows: slice, x_LKD: Tensor) -> None:
        assert self.target is not None
        self.target.put(rows, x_LKD)

    def _units(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for rows, parts in self._pieces():
            yield rows, torch.cat([x_LRD.to(dtype) for x_LRD in parts], dim=1)

    def _pieces(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Some modules' factors at a time, with their places in the pool."""
        place = 0
        for block in self.blocks:
            step = max(1, _PIECE_BYTES // (4 * sum(part.stack_LRD[0].numel() for part in block)))
            for start in range(0, len(block[0]), step):
                parts = [part[start : start + step] for part in block]
                yield slice(place, place + len(parts[0])), parts
                place += len(parts[0])
