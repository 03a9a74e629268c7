"""Merging entry by entry: what to drop of each adapter's factor (a sparsifier), and how to make one of all (a consensus).

    method      sparsifier   consensus
    linear      –            weighted sum
    magnitude   largest      weighted sum
    ties        largest      elected sign
    dare        random       weighted sum or elected sign

Conventions are PEFT's (peft/utils/merge_utils.py): A and B apart, signs elected before weighting.
This is in torch, for the CPU; cuda_elementwise.py has the GPU's.
Shape suffixes as in pool.py; D is I or O. Weights are (L, T) float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merging.errors import RecipeError, shown

Majority = Literal["total", "frequency"]


@dataclass(frozen=True)
class Largest:
    """Sparsifier: see `largest`."""

    density: float


@dataclass(frozen=True)
class Random:
    """Sparsifier: see `random`. The seed sets the draws of equal keys apart."""

    density: float
    seed: int


@dataclass(frozen=True)
class Blend:
    """A row of the table above: how each merged entry is made of the same entry of T adapters' factors.

    Attributes:
        sparsifier: what to drop first of each factor; None keeps all.
        majority: how the signs of `elected_sign` are elected; None takes the weighted sum.
    """

    sparsifier: Largest | Random | None = None
    majority: Majority | None = None

    def __call__(self, parts: Sequence[Tensor], weight_LT: Tensor, key_LT: Tensor) -> Tensor:
        """The merged factors, (L, R, D) float32.

        Args:
            parts: the factors of T adapters, (L, R, D) in their own dtype.
            key_LT: int64 seeds that tell the factors apart.
        """
        kept = [self._sparse(x_LRD, key_L) for x_LRD, key_L in zip(parts, key_LT.T, strict=True)]
        return weighted_sum(kept, weight_LT) if self.majority is None else elected_sign(kept, weight_LT, self.majority)

    def _sparse(self, x_LRD: Tensor, key_L: Tensor) -> Tensor:
        match self.sparsifier:
            case None:
                return x_LRD
            case Largest(density):
                return largest(x_LRD, density)
            case Random(density, seed):
                return random(x_LRD, density, key_L ^ seed)


def equal_rank(method: str, ranks: Sequence[int], others: str) -> int:
    """The one rank of all adapters; methods that work entry by entry have no other way to line factors up."""
    if len(set(ranks)) > 1:
        raise RecipeError(f"{method} needs adapters of equal rank, these have {sorted(set(ranks))}; use {others}", "method")
    return ranks[0]


def check_density(method: str, density: float) -> None:
    if not 0 < density <= 1:
        raise RecipeError(f"density {density:g} of {method} is outside (0, 1]: the part of the entries to keep", "density")


def check_seed(method: str, seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise RecipeError(f"seed={shown(seed)} of {method}; use 0 to 2^31 − 1", "seed")


def largest(x_LRD: Tensor, density: float) -> Tensor:
    """Keep the ⌊density · R D⌋ entries of largest magnitude in each factor; entries that tie with the last kept stay too."""
    flat_LX = x_LRD.abs().flatten(1)
    count, keep = flat_LX.shape[1], int(density * flat_LX.shape[1])
    if keep == count:
        return x_LRD
    if keep == 0:
        return torch.zeros_like(x_LRD)
    threshold_L1 = flat_LX.kthvalue(count - keep + 1, dim=1, keepdim=True).values
    return torch.where(x_LRD.abs() >= threshold_L1[:, :, None], x_LRD, 0.0)


def random(x_LRD: Tensor, density: float, key_L: Tensor) -> Tensor:
    """Keep each entry with probability `density`, and divide by it what is kept, so that the expectation stays.

    Which entries stay depends on `key_L` and their place alone: a counter-based generator gives the same mask on
    every device. Source: DARE (Yu et al., ICML 2024).
    """
    if density == 1:
        return x_LRD
    place_X = torch.arange(x_LRD[0].numel(), dtype=torch.int32, device=x_LRD.device)
    bits_LX = _hash(place_X[None] ^ _hash(key_L.to(torch.int32))[:, None])
    kept_LX = (bits_LX & 0x7FFFFFFF) < draw_limit(density)
    return torch.where(kept_LX.view_as(x_LRD), x_LRD.float() / density, 0.0)


def draw_limit(density: float) -> int:
    """The 31-bit draws below this number make up the part `density` of all."""
    return min(round(density * 2**31), 2**31 - 1)


def weighted_sum(parts: Sequence[Tensor], weight_LT: Tensor) -> Tensor:
    """Σ_t w_t x_t, (L, R, D) float32."""
    total_LRD = parts[0].float() * weight_LT[:, 0, None, None]
    for t, x_LRD in enumerate(parts[1:], start=1):
        total_LRD.addcmul_(x_LRD.float(), weight_LT[:, t, None, None])
    return total_LRD


def elected_sign(parts: Sequence[Tensor], weight_LT: Tensor, majority: Majority) -> Tensor:
    """Mean of w_t x_t over the adapters whose entry has the sign that the majority elects, (L, R, D) float32.

    Source: TIES-Merging (Yadav et al., NeurIPS 2023); the majority is of the total (Σ x_t) or of the frequency (Σ sign x_t).
    """
    votes = [x_LRD.float() if majority == "total" else x_LRD.sign().float() for x_LRD in parts]
    elected_LRD = torch.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0)
    total_LRD, count_LRD = torch.zeros_like(elected_LRD), torch.zeros_like(elected_LRD)
    for t, x_LRD in enumerate(parts):
        agrees_LRD = (x_LRD * elected_LRD > 0).float()
        total_LRD.addcmul_(x_LRD.float() * agrees_LRD, weight_LT[:, t, None, None])
        count_LRD += agrees_LRD
    return total_LRD.div_(count_LRD.clamp_(min=1))


def _hash(x: Tensor) -> Tensor:
    """lowbias32 (Wellons, 2018) of int32 numbers: every bit of the result depends on every bit of x."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975  # 0x846CA68B as int32
    return x ^ ((x >> 16) & 0xFFFF)
