"""How merged modules are made of a pool's units: every method answers with one of these three.

Shape suffixes as in pool.py.
"""

import zlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from merging.elementwise import Blend
from merging.pool import Pool


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

    The weights of f are √|w c| on each side, with the sign of w c on A, which is PEFT's way to share a weight out.
    """

    blend: Blend


Assembly = Kept | Mixed | Blended


def assemble(pool: Pool, assembly: Assembly) -> None:
    """Write the merged modules of a pool to where its sides have room for them."""
    match assembly:
        case Kept(scale_LN):
            pool.a.keep(torch.ones_like(scale_LN))
            pool.b.keep(scale_LN)
        case Mixed(t_a_LKN, t_b_LKN, peak_LK):
            scale_LK = None
            if peak_LK is not None:
                now_LK = torch.maximum(pool.a.peak_of_mix(t_a_LKN), pool.b.peak_of_mix(t_b_LKN))
                scale_LK = torch.where(now_LK > 0, peak_LK / now_LK, 0.0)
            pool.a.mix(t_a_LKN, scale_LK)
            pool.b.mix(t_b_LKN, scale_LK)
        case Blended(blend):
            root_LT, sign_LT = pool.coefficient_LT.abs().sqrt(), pool.coefficient_LT.sign()
            device = root_LT.device
            pool.a.blend(blend, (root_LT * sign_LT).float(), _keys(pool.modules, pool.adapters, "A", device))
            pool.b.blend(blend, root_LT.float(), _keys(pool.modules, pool.adapters, "B", device))


@cache  # a constant: a CUDA graph reads it where it lies
def _keys(modules: tuple[str, ...], adapters: tuple[int, ...], side: str, device: torch.device) -> Tensor:
    """(L, T) int64: numbers that tell all factors of a merge apart, the same on every device."""
    return torch.tensor([[zlib.crc32(f"{m} {side} {t}".encode()) >> 1 for t in adapters] for m in modules]).to(device)
