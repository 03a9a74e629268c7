"""dare: drop entries at random, rescale the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from merging.assembly import Blended
from merging.elementwise import Blend, Majority, Random, check_density, check_seed, equal_rank
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class DareOptions(Options):
    """Options of dare.

    density: probability that an entry is kept, in (0, 1].
    consensus: what to make of the kept entries: their weighted sum ("linear") or what ties makes of them ("ties").
    majority: as in ties.
    seed: of the draws; they depend on the module and on the adapter's place among the digests besides.
    """

    density: float = 0.5
    consensus: Literal["linear", "ties"] = "linear"
    majority: Majority = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        check_density("dare", self.density)
        check_seed("dare", self.seed)


def rank(ranks: Sequence[int], options: DareOptions) -> int:
    return equal_rank("dare", ranks, "core-ties, svd, lego or cat")


@method("dare", version=1, options=DareOptions, rank=rank, number="density")
def dare(pool: Pool, options: DareOptions) -> Blended:
    """Drop And REscale on the factors: an entry is kept with probability `density` and divided by it, or else 0.

    Source: DARE (Yu et al., ICML 2024), as PEFT's `dare_linear` and `dare_ties` apply it to LoRA.
    """
    majority = options.majority if options.consensus == "ties" else None
    return Blended(Blend(Random(options.density, options.seed), majority))
