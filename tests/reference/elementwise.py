"""ties, dare's consensus and magnitude, naively: one entry at a time in float64, as PEFT's merge_utils.py defines them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging import LoraModule

Terms = Sequence[tuple[LoraModule, float]]


def trimmed(x: Tensor, density: float) -> Tensor:
    """The ⌊density · n⌋ entries of largest magnitude; random entries have no ties."""
    keep = int(density * x.numel())
    order = sorted(range(x.numel()), key=lambda i: -abs(float(x.flatten()[i])))[:keep]
    out = torch.zeros(x.numel(), dtype=torch.float64)
    for i in order:
        out[i] = x.flatten()[i].double()
    return out.view(x.shape)


def summed(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(weight * part for part, weight in zip(parts, weights, strict=True))


def elected(parts: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    flat = [part.flatten().tolist() for part in parts]
    out = []
    for entries in zip(*flat, strict=True):
        votes = entries if majority == "total" else [math.copysign(1, x) if x else 0 for x in entries]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [w * x for x, w in zip(entries, weights, strict=True) if x * sign > 0]
        out.append(sum(agree) / max(len(agree), 1))
    return torch.tensor(out, dtype=torch.float64).view(parts[0].shape)


def sides(terms: Terms) -> list[tuple[list[Tensor], list[float]]]:
    """A's and B's factors with their weights: √|w c| on both, the sign of w on A's."""
    roots = [math.sqrt(abs(weight * module.scaling)) for module, weight in terms]
    signed = [math.copysign(root, weight) for root, (_, weight) in zip(roots, terms, strict=True)]
    return [([m.a.double() for m, _ in terms], signed), ([m.b.double() for m, _ in terms], roots)]


def magnitude(terms: Terms, density: float) -> Tensor:
    a, b = (summed([trimmed(x, density) for x in parts], weights) for parts, weights in sides(terms))
    return b @ a


def ties(terms: Terms, density: float, majority: str = "total") -> Tensor:
    a, b = (elected([trimmed(x, density) for x in parts], weights, majority) for parts, weights in sides(terms))
    return b @ a
