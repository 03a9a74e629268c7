"""How merged modules are made of a pool's units: every method answers with one of these three.

Shape suffixes as in pool.py; D is I or O.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.adapter import Stack
from merging.pool import UnitBlock
from merging.products import UnitRows

_CPU_PIECE = 1 << 18  # entries


@dataclass(frozen=True)
class Kept:
    """Every unit is kept, its B side scaled: A' = A, B' = B · diag(scale). Exact, rank N."""

    scale_LN: Tensor


@dataclass(frozen=True)
class Mixed:
    """K merged units, each a mixture of the module's: A' = T_A A and B' = B T_Bᵀ.

    Attributes:
        t_a_LKN, t_b_LKN: the mixtures, float64.
        peak_LK: where given, each merged unit [a'; b'] is rescaled to this largest magnitude (∞-norm).
    """

    t_a_LKN: Tensor
    t_b_LKN: Tensor
    peak_LK: Tensor | None = None


@dataclass(frozen=True)
class Blended:
    """Each entry of a merged factor is made of the same entry of every adapter's: A' = f(A_1, …, A_T), and so for B.

    Attributes:
        blend: f of (factors of T adapters (L, R, D) in their own dtype, weight_LT float32, key_LT int64) -> (L, R, D) float32.
            The weights are √|w c| on each side, with the sign of w on A. The keys tell all factors of a merge apart,
            and are the same on every device: seeds for f.
    """

    blend: Callable[[list[Tensor], Tensor, Tensor], Tensor]


Assembly = Kept | Mixed | Blended


def assemble(block: UnitBlock, assembly: Assembly, start: int, dtype: torch.dtype) -> Stack:
    """The merged modules of one block, in `dtype`; sums run in float32.

    Args:
        start: the block's first module in the pool's L.
    """
    if isinstance(assembly, Kept):
        return _stack(block, *_kept(block, assembly.scale_LN[start : start + len(block.modules)].float(), dtype))
    if isinstance(assembly, Mixed):
        return _stack(block, *_mixed(block, assembly, slice(start, start + len(block.modules)), dtype))
    return _stack(block, *_blended(block, assembly, dtype))


def _empty(block: UnitBlock, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for a_LKI and b_LKO; B lies in memory as (L, O, K), so that each module's B is contiguous as engines take it."""
    count, inputs, outputs = len(block.modules), block.a.parts[0].shape[2], block.b.parts[0].shape[2]
    a_LKI = torch.empty(count, rank, inputs, dtype=dtype, device=block.device)
    return a_LKI, torch.empty(count, outputs, rank, dtype=dtype, device=block.device).mT


def _stack(block: UnitBlock, a_LKI: Tensor, b_LKO: Tensor) -> Stack:
    return Stack(block.modules, a_LKI, b_LKO, (1.0,) * len(block.modules))


def _kept(block: UnitBlock, scale_LN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a_LNI, b_LNO = _empty(block, sum(block.ranks), dtype)
    end = 0
    for a_LRI, b_LRO in zip(block.a.parts, block.b.parts, strict=True):
        units = slice(end, end := end + a_LRI.shape[1])
        a_LNI[:, units] = a_LRI
        torch.mul(b_LRO, scale_LN[:, units, None], out=b_LNO[:, units])
    return a_LNI, b_LNO


def _mixed(block: UnitBlock, mixed: Mixed, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    t_a_LKN, t_b_LKN = mixed.t_a_LKN[rows], mixed.t_b_LKN[rows]
    if mixed.peak_LK is not None:
        now_LK = torch.maximum(block.a.mixture_peak(t_a_LKN), block.b.mixture_peak(t_b_LKN)).double()
        ratio_LK1 = torch.where(now_LK > 0, mixed.peak_LK[rows] / now_LK, 0.0)[:, :, None]
        t_a_LKN, t_b_LKN = ratio_LK1 * t_a_LKN, ratio_LK1 * t_b_LKN
    a_LKI, b_LKO = _empty(block, t_a_LKN.shape[1], dtype)
    block.a.mixture(t_a_LKN, a_LKI)
    block.b.mixture(t_b_LKN, b_LKO)
    return a_LKI, b_LKO


def _blended(block: UnitBlock, blended: Blended, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PEFT's way to share a weight out: √|w c| on both sides, the sign of w c on A's."""
    root_LT = block.coefficient_LT.abs().sqrt()
    factors = _empty(block, block.ranks[0], dtype)
    sides = ((block.a, root_LT * block.coefficient_LT.sign()), (block.b, root_LT))
    for out, (side, weight_LT), name in zip(factors, sides, "AB", strict=True):
        key_LT = torch.tensor([[zlib.crc32(f"{m} {name} {t}".encode()) >> 1 for t in block.adapters] for m in block.modules])
        weight_LT, key_LT = weight_LT.float().to(block.device, non_blocking=True), key_LT.to(block.device, non_blocking=True)
        for rows in _pieces(block, side):
            out[rows] = blended.blend([x_LRD[rows] for x_LRD in side.parts], weight_LT[rows], key_LT[rows])
    return factors


def _pieces(block: UnitBlock, side: UnitRows) -> Iterator[slice]:
    """Modules to blend at a time: few on the CPU, so that all steps stay in its cache; all of them on a GPU."""
    count = len(block.modules)
    step = count if block.device.type == "cuda" else max(1, _CPU_PIECE // sum(x_LRD[0].numel() for x_LRD in side.parts))
    return (slice(start, start + step) for start in range(0, count, step))
