"""linear: PEFT's weighted sum of the factors."""

from collections.abc import Sequence
from dataclasses import dataclass

from merging.assembly import Blended
from merging.elementwise import Blend, equal_rank
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class LinearOptions(Options):
    """linear takes no options."""


def rank(ranks: Sequence[int], options: LinearOptions) -> int:
    return equal_rank("linear", ranks, "cat, lego or svd")


@method("linear", version=1, options=LinearOptions, rank=rank)
def linear(pool: Pool, options: LinearOptions) -> Blended:
    """A' = Σ_t s_t √|w_t c_t| A_t and B' = Σ_t √|w_t c_t| B_t, with s_t the sign of w_t.

    The product carries cross terms B_i A_j, unlike cat. Source: PEFT `add_weighted_adapter`, `linear`.
    """
    return Blended(Blend())
