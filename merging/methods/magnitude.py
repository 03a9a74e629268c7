"""magnitude: the weighted sum of the factors' largest entries."""

from collections.abc import Sequence
from dataclasses import dataclass

from merging.assembly import Blended
from merging.elementwise import Blend, Largest, check_density, equal_rank
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class MagnitudeOptions(Options):
    """density: part of each factor's entries to keep, in (0, 1]."""

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density("magnitude", self.density)


def rank(ranks: Sequence[int], options: MagnitudeOptions) -> int:
    return equal_rank("magnitude", ranks, "svd, lego or cat")


@method("magnitude", version=1, options=MagnitudeOptions, rank=rank, number="density")
def magnitude(pool: Pool, options: MagnitudeOptions) -> Blended:
    """linear, after all but the entries of largest magnitude of each A_t and B_t are set to 0.

    Source: PEFT `add_weighted_adapter`, `magnitude_prune`.
    """
    return Blended(Blend(Largest(options.density)))
