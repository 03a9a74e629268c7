"""One side of a pool's units on the GPU: how the kernels of cuda_kernels.py are launched.

Shape suffixes as in pool.py; D is I or O, P parts of the modules' rows.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from merging import cuda_kernels as kernels
from merging.cuda_elementwise import blend_rows
from merging.cuda_tables import SideTable, TargetTable, constant
from merging.elementwise import Blend

_PARTS = 720  # programs that fill any GPU a few times over
# With pipelined loads (2 or 3 stages), Triton 3.6 gave Gram matrices of 64 half-precision units that were 1 to 11 % off
# on an H100 (2026-11-22); with one stage they are right. tests/merging_methods/test_cuda.py holds it.
_STAGES = 1


@dataclass(frozen=True)
class CudaSide:
    """See Side.

    Attributes:
        target: None where nothing is to be written.
    """

    table: SideTable
    target: TargetTable | None = None

    def gram(self, *, fine: bool) -> tuple[Tensor, Tensor]:
        """Both accumulated in float32, fine or not: double precision is not worth its time here."""
        table = self.table
        layers, units = len(table.widths), sum(table.ranks)
        tile = min(128, max(16, triton.next_power_of_2(units)))
        block = 64 if tile > 64 else 128
        pairs = _pairs(triton.cdiv(units, tile))
        chunk = _chunk(table.widths, len(pairs) // 2, block)
        parts = _parts(table.widths, chunk)
        count = len(parts) // 2
        gram_PNN = torch.empty(count, units, units, dtype=torch.float32, device=table.width_L.device)
        peak_LN = torch.zeros(layers, units, dtype=torch.float32, device=table.width_L.device)
        kernels.gram_of_parts[(count, len(pairs) // 2)](
            *_table_arguments(table), constant(parts, gram_PNN.device), constant(pairs, gram_PNN.device), gram_PNN, peak_LN,
            units, len(table.ranks), chunk, count, len(pairs) // 2,
            TILE=tile, BLOCK=block, SYMMETRIC=len(pairs) == 2, num_warps=8 if tile > 64 else 4, num_stages=_STAGES,
            **table.constants,
        )  # fmt: skip
        gram_LNN = torch.empty(layers, units, units, dtype=torch.float64, device=gram_PNN.device)
        starts = constant(_starts(table.widths, chunk), gram_PNN.device)
        kernels.sum_of_parts[(layers, triton.cdiv(units * units, 1024))](
            gram_PNN, starts, gram_LNN, units, TILE=tile, BLOCK=1024
        )
        return gram_LNN, peak_LN.double()

    def peak_sign(self) -> Tensor:
        table = self.table
        sign_LN = torch.empty(len(table.widths), sum(table.ranks), dtype=torch.float64, device=table.width_L.device)
        kernels.peak_sign[tuple(sign_LN.shape)](
            *_table_arguments(table), sign_LN, sign_LN.shape[1], len(table.ranks), BLOCK=1024, **table.constants
        )
        return sign_LN

    def keep(self, scale_LN: Tensor) -> None:
        table, target = self.table, self._target
        units, tile, block = sum(table.ranks), min(64, max(16, triton.next_power_of_2(target.rank))), 128
        kernels.keep[(len(table.widths), triton.cdiv(max(target.widths), block), triton.cdiv(target.rank, tile))](
            *_table_arguments(table), scale_LN.float(), *_target_arguments(target), units, len(table.ranks), target.rank,
            TILE=tile, BLOCK=block, num_warps=4, **table.constants, **target.constants,
        )  # fmt: skip

    def mix(self, t_LKN: Tensor, scale_LK: Tensor | None = None) -> None:
        target = self._target
        self._mix(t_LKN, target.rank, _target_arguments(target), scale_LK, None, **target.constants)

    def peak_of_mix(self, t_LKN: Tensor) -> Tensor:
        peak_LK = torch.zeros(t_LKN.shape[:2], dtype=torch.float32, device=t_LKN.device)
        width_L = self.table.width_L
        unused = (self.table.address_LT, width_L, width_L, width_L, width_L)
        self._mix(t_LKN, t_LKN.shape[1], unused, None, peak_LK, RESULT=tl.float32, UNITS_FAST=False, ROOM_ALIGNED=True)
        return peak_LK

    def blend(self, blend: Blend, weight_LT: Tensor, key_LT: Tensor) -> None:
        blend_rows(self.table, blend, weight_LT, key_LT, self._target)

    @property
    def _target(self) -> TargetTable:
        assert self.target is not None
        return self.target

    def _mix(
        self, t_LKN: Tensor, rank: int, room: tuple[Tensor, ...], scale_LK: Tensor | None, peak_LK: Tensor | None,
        **constants: object,
    ) -> None:  # fmt: skip
        table = self.table
        units, k = sum(table.ranks), t_LKN.shape[1]
        padded = min(64, max(16, triton.next_power_of_2(rank)))
        block = 4096 // padded
        kernels.mix[(len(table.widths), triton.cdiv(max(table.widths), block), triton.cdiv(rank, padded))](
            *_table_arguments(table), t_LKN.contiguous(), scale_LK, *room, peak_LK, units, len(table.ranks), k, rank,
            KP=padded, TILE=16, BLOCK=block,
            SPLIT=table.dtype == torch.bfloat16, num_warps=4, num_stages=_STAGES, **table.constants, **constants,
        )  # fmt: skip


def _table_arguments(table: SideTable) -> tuple[Tensor, ...]:
    return table.address_LT, table.width_L, table.owner_N, table.row_N


def _target_arguments(target: TargetTable) -> tuple[Tensor, ...]:
    return target.address_L, target.stride_k_L, target.stride_d_L, target.first_L, target.width_L


@cache
def _pairs(tiles: int) -> tuple[int, ...]:
    """The tiles of a symmetric matrix on and over its diagonal: all rows, then all columns."""
    rows, columns = zip(*((i, j) for i in range(tiles) for j in range(i, tiles)), strict=True)
    return rows + columns


@cache
def _chunk(widths: tuple[int, ...], pairs: int, block: int) -> int:
    """Columns that one program takes: enough programs to fill the GPU, few enough for small results."""
    chunk = 1024
    while chunk < 8192 and pairs * sum(triton.cdiv(width, chunk) for width in widths) > _PARTS:
        chunk *= 2
    return max(chunk, block)


@cache
def _parts(widths: tuple[int, ...], chunk: int) -> tuple[int, ...]:
    """The parts of the modules' rows: the modules of all, then their first columns."""
    parts = [(layer, first) for layer, width in enumerate(widths) for first in range(0, width, chunk)]
    layers, firsts = zip(*parts, strict=True)
    return layers + firsts


@cache
def _starts(widths: tuple[int, ...], chunk: int) -> tuple[int, ...]:
    """The first part of each module, and the end."""
    counts = [triton.cdiv(width, chunk) for width in widths]
    return tuple(sum(counts[:layer]) for layer in range(len(counts) + 1))
