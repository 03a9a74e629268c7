"""core-ties: TIES in the common basis of all adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merging.assembly import Mixed
from merging.core import CoreSpace, check_rank, rank_of
from merging.elementwise import check_density, elected_sign, largest
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class CoreTiesOptions(Options):
    """Options of core-ties.

    density: part of each core's entries to keep, in (0, 1].
    rank: rank of the result; the largest rank of the adapters if not given.
    """

    density: float = 0.2
    rank: int | None = None

    def __post_init__(self) -> None:
        check_density("core-ties", self.density)
        check_rank("core-ties", self.rank)


def rank(ranks: Sequence[int], options: CoreTiesOptions) -> int:
    return rank_of(ranks, options.rank)


@method("core-ties", version=1, options=CoreTiesOptions, rank=rank, number="density")
def core_ties(pool: Pool, options: CoreTiesOptions) -> Mixed:
    """TIES on the cores U_Bᵀ (w_t ΔW_t) V_A, in the basis of the singular vectors of [B_1 … B_T] and [A_1; …; A_T].

    Weights come before the election, so a negative one turns its adapter's votes around. The election is of the total:
    one of the frequency would depend on the signs of the singular vectors, which are arbitrary. Then the best
    approximation of rank k. Source: Core Space (Panariello et al., NeurIPS 2025), TIES-Merging (Yadav et al., NeurIPS 2023).
    """
    space = CoreSpace(pool)
    cores = [largest(space.core(units), options.density) for units in pool.owners]
    one_LT = torch.ones(len(cores[0]), len(cores), dtype=torch.float64, device=cores[0].device)
    return space.truncated(elected_sign(cores, one_LT, "total").double(), rank(pool.ranks, options))
