"""svd: the best approximation of the weighted sum at a given rank, without ever forming a dense ΔW."""

from merging.assembly import Mixed
from merging.methods.rank_options import RankOptions, merged_rank
from merging.methods.registry import method
from merging.nearest import nearest
from merging.pool import Pool


class SvdOptions(RankOptions):
    method = "svd"


@method("svd", version=1, options=SvdOptions, rank=merged_rank, number="rank")
def svd(pool: Pool, options: SvdOptions) -> Mixed:
    """The rank-k matrix nearest to Σ_t w_t ΔW_t in the Frobenius norm (Eckart and Young, 1936)."""
    return nearest(pool, merged_rank(pool.ranks, options))
