"""ties: trim, elect a sign for each entry, average what agrees."""

from collections.abc import Sequence
from dataclasses import dataclass

from merging.assembly import Blended
from merging.elementwise import Blend, Largest, Majority, check_density, equal_rank
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class TiesOptions(Options):
    """Options of ties.

    density: part of each factor's entries to keep, in (0, 1].
    majority: elect the sign of the sum of the entries ("total") or of their signs ("frequency").
    """

    density: float = 0.2
    majority: Majority = "total"

    def __post_init__(self) -> None:
        check_density("ties", self.density)


def rank(ranks: Sequence[int], options: TiesOptions) -> int:
    return equal_rank("ties", ranks, "core-ties, svd, lego or cat")


@method("ties", version=1, options=TiesOptions, rank=rank, number="density")
def ties(pool: Pool, options: TiesOptions) -> Blended:
    """TIES-Merging of the factors: A' of the A_t and B' of the B_t, each on its own.

    Keep the entries of largest magnitude of each factor, elect a sign for each entry, and average the weighted
    entries that have it. Source: TIES-Merging (Yadav et al., NeurIPS 2023), as PEFT's `ties` applies it to LoRA.
    """
    return Blended(Blend(Largest(options.density), options.majority))
