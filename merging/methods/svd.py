"""svd: the best approximation of the weighted sum at a given rank, without ever forming a dense ΔW."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.assembly import Mixed
from merging.errors import RecipeError
from merging.methods.registry import Options, method
from merging.pool import UnitBlock


@dataclass(frozen=True)
class SvdOptions(Options):
    """rank: rank of the result; the largest rank of the adapters if not given."""

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank {self.rank} of svd; use 1 or more", "rank")


def rank(ranks: Sequence[int], options: SvdOptions) -> int:
    return min(options.rank or max(ranks), sum(ranks))


@method("svd", version=1, options=SvdOptions, rank=rank, number="rank")
def svd(block: UnitBlock, options: SvdOptions) -> Mixed:
    """The rank-k matrix nearest to Σ_t w_t ΔW_t in the Frobenius norm (Eckart and Young, 1936).

    With A = R_A Q_A and B = Q_B R_Bᵀ (Q_A, Q_B orthonormal; R from the Gram matrices), ΔW = Q_B C Q_A for the
    N × N core C = R_Bᵀ diag(w c) R_A, whose singular value decomposition P Σ Rᵀ is that of ΔW.
    """
    k = rank(block.ranks, options)
    root_a_LNN, inverse_a_LNN = _root(block.gram_a_LNN)
    root_b_LNN, inverse_b_LNN = _root(block.gram_b_LNN)
    core_LNN = root_b_LNN.mT @ (block.coefficients[:, :, None] * root_a_LNN)
    p_LNN, sigma_LN, r_LNN = torch.linalg.svd(core_LNN)
    half_LK1 = sigma_LN[:, :k, None].sqrt()
    return Mixed(half_LK1 * (r_LNN[:, :k] @ inverse_a_LNN), half_LK1 * (p_LNN.mT[:, :k] @ inverse_b_LNN))


def _root(gram_LNN: Tensor) -> tuple[Tensor, Tensor]:
    """R with G = R Rᵀ, and its pseudo-inverse; directions below the Gram matrix's float32 noise are dropped.

    Units are brought to length 1 first, so that a unit of tiny norm is not taken for noise beside a huge one.
    """
    norm_LN = gram_LNN.diagonal(dim1=1, dim2=2).sqrt()
    unit_LN = torch.where(norm_LN > 0, 1 / norm_LN, 0.0)
    value_LN, vector_LNN = torch.linalg.eigh(unit_LN[:, :, None] * gram_LNN * unit_LN[:, None, :])
    noise = gram_LNN.shape[-1] * torch.finfo(torch.float32).eps
    root_LN = torch.where(value_LN > noise * value_LN[:, -1:], value_LN, 0.0).sqrt()
    inverse_LN = torch.where(root_LN > 0, 1 / root_LN, 0.0)
    root_LNN = norm_LN[:, :, None] * vector_LNN * root_LN[:, None, :]
    return root_LNN, inverse_LN[:, :, None] * vector_LNN.mT * unit_LN[:, None, :]
