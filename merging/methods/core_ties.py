"""core-ties: TIES in the common basis of all adapters."""

from dataclasses import dataclass

import torch

from merging.assembly import Mixed
from merging.core import CoreSpace, singular_basis
from merging.elementwise import check_density, elected_sign, largest
from merging.methods.rank_options import RankOptions, merged_rank
from merging.methods.registry import method
from merging.pool import Pool


@dataclass(frozen=True)
class CoreTiesOptions(RankOptions):
    """density: part of each core's entries to keep, in (0, 1]."""

    method = "core-ties"
    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density("core-ties", self.density)


@method("core-ties", version=1, options=CoreTiesOptions, rank=merged_rank, number="density")
def core_ties(pool: Pool, options: CoreTiesOptions) -> Mixed:
    """TIES on the cores U_Bᵀ (w_t ΔW_t) V_A, in the basis of the singular vectors of [B_1 … B_T] and [A_1; …; A_T].

    Weights come before the election, so a negative one turns its adapter's votes around. The election is of the total:
    one of the frequency would depend on the signs of the singular vectors, which are arbitrary. Then the best
    approximation of rank k. Source: Core Space (Panariello et al., NeurIPS 2025), TIES-Merging (Yadav et al., NeurIPS 2023).
    """
    space = CoreSpace(pool, singular_basis)
    cores = [largest(space.core(units), options.density) for units in pool.owners]
    one_LT = torch.ones(len(cores[0]), len(cores), dtype=torch.float64, device=cores[0].device)
    return space.truncated(elected_sign(cores, one_LT, "total").double(), merged_rank(pool.ranks, options))
