"""svd: the best approximation of the weighted sum at a given rank, without ever forming a dense ΔW."""

from collections.abc import Sequence
from dataclasses import dataclass

from merging.assembly import Mixed
from merging.core import CoreSpace, check_rank, rank_of
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class SvdOptions(Options):
    """rank: rank of the result; the largest rank of the adapters if not given."""

    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank("svd", self.rank)


def rank(ranks: Sequence[int], options: SvdOptions) -> int:
    return rank_of(ranks, options.rank)


@method("svd", version=1, options=SvdOptions, rank=rank, number="rank")
def svd(pool: Pool, options: SvdOptions) -> Mixed:
    """The rank-k matrix nearest to Σ_t w_t ΔW_t in the Frobenius norm (Eckart and Young, 1936)."""
    space = CoreSpace(pool)
    return space.truncated(space.core(), rank(pool.ranks, options))
