"""cat: the exact weighted sum, by concatenation."""

from collections.abc import Sequence
from dataclasses import dataclass

from merging.assembly import Kept
from merging.methods.registry import Options, method
from merging.pool import Pool


@dataclass(frozen=True)
class CatOptions(Options):
    """cat takes no options."""


def rank(ranks: Sequence[int], options: CatOptions) -> int:
    return sum(ranks)


@method("cat", version=1, options=CatOptions, rank=rank)
def cat(pool: Pool, options: CatOptions) -> Kept:
    """ΔW = Σ_t w_t ΔW_t, with A' = [A_1; …; A_T] and B' = [w_1 c_1 B_1 | … | w_T c_T B_T].

    Source: LoRA Soups (Prabhakar et al., COLING 2025), CAT with given weights.
    """
    return Kept(pool.coefficient_LN)
