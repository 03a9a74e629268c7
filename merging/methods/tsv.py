"""tsv: the adapters' singular vectors, freed of what they share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from merging.assembly import Mixed
from merging.core import CoreSpace, basis
from merging.eigen import eigh, svd
from merging.methods.rank_options import RankOptions, merged_rank
from merging.methods.registry import method
from merging.pool import Pool

# Directions that hold less than this part of the largest are noise; whitening would blow them up.
_NOISE = 1e-3


class TsvOptions(RankOptions):
    method = "tsv"


@method("tsv", version=1, options=TsvOptions, rank=merged_rank, number="rank")
def tsv(pool: Pool, options: TsvOptions) -> Mixed:
    """ΔW = U⊥ Σ V⊥ᵀ: the singular vectors of all w_t ΔW_t side by side, made orthonormal with the least change.

    U⊥ = U (Uᵀ U)^(−1/2) for U = [U_1 … U_T] (Procrustes), and so V⊥; Σ holds all their singular values. Then the best
    approximation of rank k. Source: TSV-Merge (Gargiulo et al., CVPR 2025), which instead keeps k / T vectors of each task.
    """
    space = CoreSpace(pool)
    left, values, right = zip(*(_singular(pool, units) for units in pool.owners), strict=True)
    left_LNN, right_LNN = _side_by_side(left), _side_by_side(right)
    sigma_LN = torch.cat(values, dim=1)
    gram_a_LNN, gram_b_LNN, _ = pool.fine_grams
    orthonormal_b_LNN, orthonormal_a_LNN = _orthonormal(left_LNN, gram_b_LNN), _orthonormal(right_LNN, gram_a_LNN)
    core_LNN = (space.b.root_LNN.mT @ orthonormal_b_LNN) @ (sigma_LN[:, :, None] * (orthonormal_a_LNN.mT @ space.a.root_LNN))
    return space.truncated(core_LNN, merged_rank(pool.ranks, options))


def _singular(pool: Pool, units: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of one adapter's w_t ΔW_t: mixtures of its units (L, R, R), and values (L, R)."""
    gram_a_LNN, gram_b_LNN, noise = pool.fine_grams
    a, b = basis(gram_a_LNN[:, units, units], noise), basis(gram_b_LNN[:, units, units], noise)
    u_LRR, sigma_LR, v_LRR = svd(b.root_LNN.mT @ (pool.coefficient_LN[:, units, None] * a.root_LNN))
    sigma_LR = torch.where(sigma_LR > _NOISE * sigma_LR[:, :1], sigma_LR, 0.0)
    real_L1R = (sigma_LR > 0).to(sigma_LR.dtype)[:, None, :]
    return (b.inverse_LNN.mT @ u_LRR) * real_L1R, sigma_LR, (a.inverse_LNN.mT @ v_LRR.mT) * real_L1R


def _side_by_side(mixtures: Sequence[Tensor]) -> Tensor:
    """(L, N, N): each adapter's mixtures of its own units, in columns of their own."""
    ranks = [mixture.shape[2] for mixture in mixtures]
    return torch.cat([pad(x, (sum(ranks[:t]), sum(ranks[t + 1 :]))) for t, x in enumerate(mixtures)], dim=1)


def _orthonormal(x_LNN: Tensor, gram_LNN: Tensor) -> Tensor:
    """X S^(−1/2) for the Gram matrix S = Xᵀ G X of the mixtures X: the nearest orthonormal ones."""
    value_LN, vector_LNN = eigh(x_LNN.mT @ gram_LNN @ x_LNN)
    inverse_LN = torch.where(value_LN > _NOISE * value_LN[:, :1], value_LN.clamp(min=0).rsqrt(), 0.0)
    return x_LNN @ (vector_LNN * inverse_LN[:, None, :]) @ vector_LNN.mT
