"""iso: the weighted sum with an even spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merging.assembly import Mixed
from merging.core import CoreSpace, check_rank, rank_of
from merging.methods.registry import Options, method
from merging.pool import Pool

# Singular values below this part of the largest are the Gram matrices' noise, and so are their directions.
_NOISE = 1e-3


@dataclass(frozen=True)
class IsoOptions(Options):
    """rank: rank of the result; the largest rank of the adapters if not given."""

    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank("iso", self.rank)


def rank(ranks: Sequence[int], options: IsoOptions) -> int:
    return rank_of(ranks, options.rank)


@method("iso", version=1, options=IsoOptions, rank=rank, number="rank")
def iso(pool: Pool, options: IsoOptions) -> Mixed:
    """Σ_t w_t ΔW_t with each of its k largest singular values replaced by their mean: ΔW = σ̄ U Vᵀ.

    So no skill drowns in the directions that others made large. Source: Iso-C (Marczak et al., ICML 2025), which
    takes the mean over all singular values of a matrix of full rank; ours is over those that are kept and not 0.
    """
    space = CoreSpace(pool)
    return space.truncated(space.core(), rank(pool.ranks, options), _even)


def _even(sigma_LK: Tensor) -> Tensor:
    real_LK = (sigma_LK > _NOISE * sigma_LK[:, :1]).to(sigma_LK.dtype)
    return real_LK * (sigma_LK * real_LK).sum(dim=1, keepdim=True) / real_LK.sum(dim=1, keepdim=True).clamp(min=1)
