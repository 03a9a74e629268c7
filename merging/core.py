"""Core space: the small common basis of a module's units, found from Gram matrices alone.

With A = R_A Q_A and Bᵀ = R_B Q_B (rows of Q orthonormal, R from the Gram matrices), every weighted sum of the
adapters' ΔW is Q_Bᵀ C Q_A with a core C of N × N numbers, whose singular values are those of ΔW. Merging cores
instead of ΔW is exact, cheap, and takes any ranks (Core Space: Panariello et al., NeurIPS 2025; KnOTS: Stoica et al.,
ICLR 2025). The basis is that of the singular vectors, as in both papers: methods that work entry by entry, such as
TIES, depend on it.

Shape suffixes as in pool.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from merging.assembly import Mixed
from merging.eigen import eigh, svd
from merging.errors import RecipeError
from merging.pool import Pool


@dataclass(frozen=True)
class Basis:
    """R with G = R Rᵀ, and its pseudo-inverse; both (L, N, N) float64."""

    root_LNN: Tensor
    inverse_LNN: Tensor


@dataclass(frozen=True)
class CoreSpace:
    """The bases of a pool's units on both sides."""

    pool: Pool

    @cached_property
    def a(self) -> Basis:
        gram_a_LNN, _, noise = self.pool.fine_grams
        return basis(gram_a_LNN, noise)

    @cached_property
    def b(self) -> Basis:
        _, gram_b_LNN, noise = self.pool.fine_grams
        return basis(gram_b_LNN, noise)

    def core(self, units: slice | None = None) -> Tensor:
        """The core of Σ w c b aᵀ over some of the units (one adapter's, say) or all: (L, N, N)."""
        units = units or slice(0, self.pool.units)
        coefficient_LN = self.pool.coefficient_LN[:, units]
        return self.b.root_LNN[:, units].mT @ (coefficient_LN[:, :, None] * self.a.root_LNN[:, units])

    def truncated(self, core_LNN: Tensor, k: int, spectrum: Callable[[Tensor], Tensor] = lambda sigma_LK: sigma_LK) -> Mixed:
        """The rank-k matrix nearest to a core (Eckart and Young, 1936), as mixtures of units.

        Args:
            spectrum: what to make of the k largest singular values, (L, K) in descending order.
        """
        p_LNN, sigma_LN, r_LNN = svd(core_LNN)
        half_LK1 = spectrum(sigma_LN[:, :k])[:, :, None].sqrt()
        t_a_LKN = half_LK1 * (r_LNN[:, :k] @ self.a.inverse_LNN)
        return Mixed(t_a_LKN, half_LK1 * (p_LNN.mT[:, :k] @ self.b.inverse_LNN))


def basis(gram_LNN: Tensor, noise: float) -> Basis:
    """A root of each Gram matrix; directions below its relative error, `noise`, are dropped.

    Columns of the root are in descending order of the units' energy along them. They are those of the eigenvectors
    of G, each by its unit's length first, so that a unit of tiny norm is not taken for noise beside a huge one.
    """
    norm_LN = gram_LNN.diagonal(dim1=1, dim2=2).sqrt()
    unit_LN = torch.where(norm_LN > 0, 1 / norm_LN, 0.0)
    value_LN, vector_LNN = eigh(unit_LN[:, :, None] * gram_LNN * unit_LN[:, None, :])
    floor_L1 = 2 * gram_LNN.shape[-1] * noise * value_LN[:, :1]
    root_LN = torch.where(value_LN > floor_L1, value_LN, 0.0).sqrt()
    inverse_LN = torch.where(root_LN > 0, 1 / root_LN, 0.0)
    root_LNN = norm_LN[:, :, None] * vector_LNN * root_LN[:, None, :]
    return Basis(root_LNN, inverse_LN[:, :, None] * vector_LNN.mT * unit_LN[:, None, :])


def check_rank(method: str, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise RecipeError(f"rank {rank} of {method}; use 1 or more", "rank")


def rank_of(ranks: Sequence[int], asked: int | None) -> int:
    """The rank of a merged module: what was asked, or the largest rank of the adapters; never over all of them together."""
    return min(asked or max(ranks), sum(ranks))
