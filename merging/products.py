"""The two large products of a merge: Gram matrices of units, and mixtures of units. In torch; cuda_products.py has the GPU's.

Shape suffixes as in pool.py; D is I or O.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_PIECE_BYTES = 1 << 20  # of units in float32: what stays in a core's cache


class UnitRows(Protocol):
    """One side of a block's units, the rows of T tensors (L, R, D)."""

    @property
    def parts(self) -> tuple[Tensor, ...]: ...

    def gram(self, *, fine: bool) -> tuple[Tensor, Tensor]:
        """Inner products of the units, (L, N, N) float64, and their largest magnitudes, (L, N) float64.

        Args:
            fine: accumulate in float64, where the device does that at little cost (the CPU), instead of float32.
        """

    def mixture(self, t_LKN: Tensor, out_LKD: Tensor) -> None:
        """Write the mixtures T X, accumulated in float32, to `out_LKD` in its dtype; any strides."""

    def mixture_peak(self, t_LKN: Tensor) -> Tensor:
        """(L, K) float32: the largest magnitude of each mixture; the mixtures themselves are not kept."""


@dataclass(frozen=True)
class TorchRows:
    """Units brought together a few modules at a time, so that the copy stays in the cache."""

    parts: tuple[Tensor, ...]

    def gram(self, *, fine: bool) -> tuple[Tensor, Tensor]:
        grams, peaks = [], []
        for _, x_LND in self._pieces(torch.float64 if fine else torch.float32):
            grams.append(x_LND @ x_LND.mT)
            peaks.append(x_LND.abs().amax(dim=2))
        return torch.cat(grams).double(), torch.cat(peaks).double()

    def mixture(self, t_LKN: Tensor, out_LKD: Tensor) -> None:
        t_LKN = t_LKN.float()
        for rows, x_LND in self._pieces(torch.float32):
            out_LKD[rows] = t_LKN[rows] @ x_LND

    def mixture_peak(self, t_LKN: Tensor) -> Tensor:
        t_LKN = t_LKN.float()
        return torch.cat([(t_LKN[rows] @ x_LND).abs().amax(dim=2) for rows, x_LND in self._pieces(torch.float32)])

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, _PIECE_BYTES // (4 * sum(x_LRD[0].numel() for x_LRD in self.parts)))
        for start in range(0, len(self.parts[0]), step):
            rows = slice(start, start + step)
            yield rows, torch.cat([x_LRD[rows].to(dtype) for x_LRD in self.parts], dim=1)


def rows_of(parts: Sequence[Tensor]) -> UnitRows:
    """The units of all adapters, with the products of the device that they are on."""
    if parts[0].is_cuda:
        from merging.cuda_products import TritonRows  # Triton is there with CUDA only

        return TritonRows.of(parts)
    return TorchRows(tuple(parts))
