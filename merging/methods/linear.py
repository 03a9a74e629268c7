"""linear: PEFT's weighted sum of the factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merging.assembly import Mixed
from merging.errors import RecipeError
from merging.methods.registry import Options, method
from merging.pool import UnitBlock


@dataclass(frozen=True)
class LinearOptions(Options):
    """linear takes no options."""


def rank(ranks: Sequence[int], options: LinearOptions) -> int:
    if len(set(ranks)) > 1:
        raise RecipeError(
            f"linear needs adapters of equal rank, these have {sorted(set(ranks))}; use cat, lego or svd", "method"
        )
    return ranks[0]


@method("linear", version=1, options=LinearOptions, rank=rank)
def linear(block: UnitBlock, options: LinearOptions) -> Mixed:
    """A' = Σ_t s_t √|w_t c_t| A_t and B' = Σ_t √|w_t c_t| B_t, with s_t the sign of w_t.

    The product carries cross terms B_i A_j, unlike cat. Source: PEFT `add_weighted_adapter`, `linear`.
    """
    eye_KN = torch.eye(block.ranks[0], dtype=torch.float64, device=block.coefficients.device).repeat(1, len(block.ranks))
    root_L1N = block.coefficients.abs().sqrt()[:, None, :]
    return Mixed(eye_KN * root_L1N * block.coefficients.sign()[:, None, :], eye_KN * root_L1N)
