"""iso: the weighted sum with an even spectrum."""

from torch import Tensor

from merging.assembly import Mixed
from merging.methods.rank_options import RankOptions, merged_rank
from merging.methods.registry import method
from merging.nearest import nearest
from merging.pool import Pool

# Singular values below this part of the largest are the Gram matrices' noise, and so are their directions.
_NOISE = 1e-3


class IsoOptions(RankOptions):
    method = "iso"


@method("iso", version=1, options=IsoOptions, rank=merged_rank, number="rank")
def iso(pool: Pool, options: IsoOptions) -> Mixed:
    """Σ_t w_t ΔW_t with each of its k largest singular values replaced by their mean: ΔW = σ̄ U Vᵀ.

    So no skill drowns in the directions that others made large. Source: Iso-C (Marczak et al., ICML 2025), which
    takes the mean over all singular values of a matrix of full rank; ours is over those that are kept and not 0.
    """
    return nearest(pool, merged_rank(pool.ranks, options), _even)


def _even(sigma_LK: Tensor) -> Tensor:
    real_LK = (sigma_LK > _NOISE * sigma_LK[:, :1]).to(sigma_LK.dtype)
    return real_LK * (sigma_LK * real_LK).sum(dim=1, keepdim=True) / real_LK.sum(dim=1, keepdim=True).clamp(min=1)
