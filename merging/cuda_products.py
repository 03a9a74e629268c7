"""The two large products of a merge on the GPU, in Triton: units are read where they lie, and read once.

A unit's row is found by an offset from the first tensor's start, so the T tensors of a block need not be brought together.
Shape suffixes as in pool.py; D is I or O, S parts of D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024  # enough to fill any GPU a few times over
# With pipelined loads (2 or 3 stages), Triton 3.6 gave Gram matrices of 64 half-precision units that were 1 to 11 % off
# on an H100 (2026-11-22); with one stage they are right. tests/merging_methods/test_cuda.py holds it.
_STAGES = 1


@dataclass(frozen=True)
class TritonRows:
    """One side of a block: T tensors (L, R, D), contiguous, one dtype, on the GPU."""

    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> "TritonRows":
        """Units of any layout; tensors of different dtypes go through float32."""
        dtypes = {x_LRD.dtype for x_LRD in parts}
        return cls(tuple((x_LRD if len(dtypes) == 1 else x_LRD.float()).contiguous() for x_LRD in parts))

    @cached_property
    def offset_2N(self) -> Tensor:
        """For each unit: elements from the first tensor's start to its row in the first module, and from module to module."""
        first, size = self.parts[0].data_ptr(), self.parts[0].element_size()
        starts: list[int] = []
        steps: list[int] = []
        for x_LRD in self.parts:
            start = (x_LRD.data_ptr() - first) // size
            starts += range(start, start + x_LRD[0].numel(), x_LRD.shape[2])
            steps += [x_LRD[0].numel()] * x_LRD.shape[1]
        return torch.tensor([starts, steps]).to(self.parts[0].device, non_blocking=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, N, D."""
        return len(self.parts[0]), sum(x_LRD.shape[1] for x_LRD in self.parts), self.parts[0].shape[2]

    @property
    def aligned(self) -> bool:
        """Whether all offsets are multiples of 8 elements, so that loads may be wide."""
        size = 8 * self.parts[0].element_size()
        return self.shape[2] % 8 == 0 and all((x.data_ptr() - self.parts[0].data_ptr()) % size == 0 for x in self.parts)

    def gram(self, *, fine: bool) -> tuple[Tensor, Tensor]:
        layers, units, width = self.shape
        tile = min(128, max(16, triton.next_power_of_2(units)))
        tiles = triton.cdiv(units, tile)
        block = 64 if tile > 64 else 128
        splits = max(1, min(_PROGRAMS // (layers * tiles * tiles), triton.cdiv(width, 2 * block)))
        gram_SLNN = torch.empty(splits, layers, units, units, dtype=torch.float32, device=self.parts[0].device)
        peak_LN = torch.zeros(layers, units, dtype=torch.float32, device=self.parts[0].device)
        _gram[(layers, splits, tiles * tiles)](
            self.parts[0], self.offset_2N, gram_SLNN, peak_LN, layers, units, width, triton.cdiv(width, splits * block), tiles,
            TILE=tile, BLOCK=block, ALIGNED=self.aligned, num_warps=8 if tile > 64 else 4, num_stages=_STAGES,
        )  # fmt: skip
        return gram_SLNN.sum(dim=0).double(), peak_LN.double()

    def mixture(self, t_LKN: Tensor, out_LKD: Tensor) -> None:
        self._mixture(t_LKN, out_LKD, keep=True)

    def mixture_peak(self, t_LKN: Tensor) -> Tensor:
        peak_LK = torch.zeros(t_LKN.shape[:2], dtype=torch.float32, device=t_LKN.device)
        self._mixture(t_LKN, peak_LK, keep=False)
        return peak_LK

    def _mixture(self, t_LKN: Tensor, target: Tensor, *, keep: bool) -> None:
        layers, units, width = self.shape
        k = t_LKN.shape[1]
        padded = max(16, triton.next_power_of_2(k))
        block = 128 if padded <= 32 else 64
        _mixture[(layers, triton.cdiv(width, block), triton.cdiv(padded, 64))](
            self.parts[0], self.offset_2N, t_LKN.float().contiguous(), target, *(target.stride() if keep else (0, 0, 0)),
            units, k, width, KP=min(padded, 64), TILE=min(32, max(16, triton.next_power_of_2(units))), BLOCK=block,
            ALIGNED=self.aligned, KEEP=keep, SPLIT=self.parts[0].dtype == torch.bfloat16, num_warps=4, num_stages=_STAGES,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _gram(  # type: ignore[no-untyped-def]  # Triton's own types
    x_ptr, offset_ptr, gram_ptr, peak_ptr, layers, units, width, blocks, tiles,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """G_ij = Σ_d x_id x_jd over one part of D, and peak_i = max_d |x_id|.

    Pointers:
        x: units, rows of D elements at their offsets; offset (2, N) int64: read.
        gram (S, L, N, N) float32: written; peak (L, N) float32, 0 before: raised.
    """
    layer = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    rows = (tl.program_id(2) // tiles) * TILE + tl.arange(0, TILE)
    columns = (tl.program_id(2) % tiles) * TILE + tl.arange(0, TILE)
    start_r = tl.load(offset_ptr + rows, mask=rows < units, other=0)
    start_r += layer * tl.load(offset_ptr + units + rows, mask=rows < units, other=0)
    start_c = tl.load(offset_ptr + columns, mask=columns < units, other=0)
    start_c += layer * tl.load(offset_ptr + units + columns, mask=columns < units, other=0)
    if ALIGNED:
        start_r = tl.multiple_of(start_r, 8)
        start_c = tl.multiple_of(start_c, 8)
    total = tl.zeros((TILE, TILE), tl.float32)
    peak = tl.zeros((TILE,), tl.float32)
    for step in range(split * blocks, (split + 1) * blocks):
        d = step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start_r[:, None] + d[None, :], mask=(rows < units)[:, None] & (d < width)[None, :], other=0.0)
        if tiles == 1:
            y = x
        else:
            y = tl.load(
                x_ptr + start_c[:, None] + d[None, :], mask=(columns < units)[:, None] & (d < width)[None, :], other=0.0
            )
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 1))
    out = gram_ptr + ((split * layers + layer) * units + rows[:, None]) * units + columns[None, :]
    tl.store(out, total, mask=(rows < units)[:, None] & (columns < units)[None, :])
    if tl.program_id(2) % tiles == 0:
        tl.atomic_max(peak_ptr + layer * units + rows, peak, mask=rows < units)


@triton.jit  # type: ignore[untyped-decorator]
def _mixture(  # type: ignore[no-untyped-def]  # Triton's own types
    x_ptr, offset_ptr, t_ptr, target_ptr, stride_l, stride_k, stride_d, units, k, width,
    KP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y_kd = Σ_n t_kn x_nd, kept or only its peak over d.

    bfloat16 units meet T as three bfloat16 terms that add up to it, so each product is exact in float32.

    Pointers:
        x, offset: as in _gram; t (L, K, N) float32: read.
        target: KEEP: (L, K, D) with the strides given: written; else (L, K) float32: raised.
    """
    layer = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(2) * KP + tl.arange(0, KP)
    total = tl.zeros((KP, BLOCK), tl.float32)
    for first in range(0, units, TILE):
        n = first + tl.arange(0, TILE)
        start = tl.load(offset_ptr + n, mask=n < units, other=0)
        start += layer * tl.load(offset_ptr + units + n, mask=n < units, other=0)
        if ALIGNED:
            start = tl.multiple_of(start, 8)
        x = tl.load(x_ptr + start[:, None] + d[None, :], mask=(n < units)[:, None] & (d < width)[None, :], other=0.0)
        t = tl.load(
            t_ptr + (layer * k + c[:, None]) * units + n[None, :], mask=(c < k)[:, None] & (n < units)[None, :], other=0.0
        )
        if SPLIT:
            high = t.to(tl.bfloat16)
            rest = t - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(low, x, total)
            total = tl.dot(middle, x, total)
            total = tl.dot(high, x, total)
        else:
            total = tl.dot(t, x.to(tl.float32), total, input_precision="ieee")
    if KEEP:
        out = target_ptr + layer * stride_l + c[:, None] * stride_k + d[None, :] * stride_d
        tl.store(out, total.to(target_ptr.dtype.element_ty), mask=(c < k)[:, None] & (d < width)[None, :])
    else:
        tl.atomic_max(target_ptr + layer * k + c, tl.max(tl.abs(total), 1), mask=c < k)
