"""Core space: the small common basis of a module's units, found from Gram matrices alone.

With A = R_A Q_A and Bᵀ = R_B Q_B (rows of Q orthonormal, R from the Gram matrices), every weighted sum of the
adapters' ΔW is Q_Bᵀ C Q_A with a core C of N × N numbers, whose singular values are those of ΔW. Merging cores
instead of ΔW is exact, cheap, and takes any ranks (Core Space: Panariello et al., NeurIPS 2025; KnOTS: Stoica et al.,
ICLR 2025).

Shape suffixes as in pool.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from merging.assembly import Mixed
from merging.eigen import CUDA_LARGEST, eigh, svd
from merging.pool import Pool


@dataclass(frozen=True)
class Basis:
    """R with G = R Rᵀ, and its pseudo-inverse, the mixtures of units that are the rows of Q; both (L, N, N) float64."""

    root_LNN: Tensor
    inverse_LNN: Tensor


def basis(gram_LNN: Tensor, noise: float) -> Basis:
    """A root of each Gram matrix; directions below its relative error, `noise`, are dropped.

    Each unit counts by its own length, so that one of tiny norm is not taken for noise beside a huge one: what is
    dropped is below √(2 N noise) of a unit's length (on a GPU 4e-3 for N = 64).
    Which basis it is, is left open: on a GPU that of the Gram-Schmidt process, by pivoted Cholesky decompositions,
    which take a fraction of an eigenproblem's time there; else that of the singular vectors.
    """
    if gram_LNN.is_cuda and gram_LNN.shape[1] <= CUDA_LARGEST:
        from merging.cuda_eigen import cholesky  # Triton is there with CUDA only

        return Basis(*cholesky(gram_LNN, _floor(gram_LNN, noise)))
    return singular_basis(gram_LNN, noise)


def singular_basis(gram_LNN: Tensor, noise: float) -> Basis:
    """The root as of `basis`, in the basis of the singular vectors of the units, each brought to length 1 first.

    It is in descending order of the units' energy along them.
    """
    norm_LN = gram_LNN.diagonal(dim1=1, dim2=2).sqrt()
    unit_LN = torch.where(norm_LN > 0, 1 / norm_LN, 0.0)
    value_LN, vector_LNN = eigh(unit_LN[:, :, None] * gram_LNN * unit_LN[:, None, :])
    floor_L1 = _floor(gram_LNN, noise) * value_LN[:, :1]
    root_LN = torch.where(value_LN > floor_L1, value_LN, 0.0).sqrt()
    inverse_LN = torch.where(root_LN > 0, 1 / root_LN, 0.0)
    root_LNN = norm_LN[:, :, None] * vector_LNN * root_LN[:, None, :]
    return Basis(root_LNN, inverse_LN[:, :, None] * vector_LNN.mT * unit_LN[:, None, :])


def _floor(gram_LNN: Tensor, noise: float) -> float:
    return 2 * gram_LNN.shape[1] * noise


@dataclass(frozen=True)
class CoreSpace:
    """The bases of a pool's units on both sides.

    Attributes:
        root: which basis; methods that work entry by entry, such as TIES, depend on it, and need `singular_basis`.
    """

    pool: Pool
    root: Callable[[Tensor, float], Basis] = basis

    @property
    def a(self) -> Basis:
        return self._sides[0]

    @property
    def b(self) -> Basis:
        return self._sides[1]

    @cached_property
    def _sides(self) -> tuple[Basis, Basis]:
        gram_a_LNN, gram_b_LNN, noise = self.pool.fine_grams
        both = self.root(torch.cat([gram_a_LNN, gram_b_LNN]), noise)
        roots, inverses = both.root_LNN.chunk(2), both.inverse_LNN.chunk(2)
        return Basis(roots[0], inverses[0]), Basis(roots[1], inverses[1])

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
