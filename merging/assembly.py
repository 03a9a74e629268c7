"""How a merged module is made of its block's units: every method answers with one of these two.

Shape suffixes as in pool.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from merging.pool import UnitBlock


@dataclass(frozen=True)
class Kept:
    """Every unit is kept, its B side scaled: A' = A, B' = B · diag(scale). Exact, rank N."""

    scale_LN: Tensor


@dataclass(frozen=True)
class Mixed:
    """K merged units, each a mixture of the block's: A' = T_A A and B' = B T_Bᵀ.

    Attributes:
        t_a_LKN, t_b_LKN: the mixtures, float64.
        peak_LK: where given, each merged unit [a'; b'] is rescaled to this largest magnitude (∞-norm).
    """

    t_a_LKN: Tensor
    t_b_LKN: Tensor
    peak_LK: Tensor | None = None


Assembly = Kept | Mixed


def assemble(block: UnitBlock, assembly: Assembly, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The merged factors (a_LKI, b_LOK) in `dtype`; products are accumulated in float32."""
    if isinstance(assembly, Kept):
        scaled_LON = block.b_LON.float() * assembly.scale_LN[:, None, :].to(block.b_LON.device, torch.float32)
        return block.a_LNI.to(dtype), scaled_LON.to(dtype)
    a_LKI = assembly.t_a_LKN.float() @ block.a_LNI.float()
    b_LOK = block.b_LON.float() @ assembly.t_b_LKN.float().mT
    if assembly.peak_LK is not None:
        peak_LK = torch.maximum(a_LKI.abs().amax(dim=2), b_LOK.abs().amax(dim=1))
        ratio_LK = torch.where(peak_LK > 0, assembly.peak_LK.float() / peak_LK, 0.0)
        a_LKI *= ratio_LK[:, :, None]
        b_LOK *= ratio_LK[:, None, :]
    return a_LKI.to(dtype), b_LOK.to(dtype)
