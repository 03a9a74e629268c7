"""dare: drop entries at random, rescale the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from merging.assembly import Blended
from merging.elementwise import Majority, check_density, check_seed, elected_sign, equal_rank, random, weighted_sum
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

    def blend(parts: list[Tensor], weight_LT: Tensor, key_LT: Tensor) -> Tensor:
        kept = [random(x, options.density, key_L ^ options.seed) for x, key_L in zip(parts, key_LT.T, strict=True)]
        if options.consensus == "linear":
            return weighted_sum(kept, weight_LT)
        return elected_sign(kept, weight_LT, options.majority)

    return Blended(blend)
