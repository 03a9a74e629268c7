"""magnitude, ties and dare, naively: one entry at a time in float64, as PEFT's merge_utils.py defines them."""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from merging import LoraModule

Terms = Sequence[tuple[LoraModule, float]]


def trimmed(x: Tensor, density: float) -> Tensor:
    """The ⌊density · n⌋ entries of largest magnitude, and those that tie with the last of them."""
    entries = x.flatten().tolist()
    keep = int(density * len(entries))
    least = sorted(map(abs, entries), reverse=True)[keep - 1] if keep else math.inf
    return torch.tensor([entry if abs(entry) >= least else 0.0 for entry in entries], dtype=torch.float64).view(x.shape)


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


def dare(
    terms: Terms, density: float, module: str, *, seed: int = 0, consensus: str = "linear", majority: str = "total"
) -> Tensor:
    """The terms in the order of their digests, as a merge takes them: masks depend on an adapter's place in it."""
    factors = []
    for name, (parts, weights) in zip("AB", sides(terms), strict=True):
        keys = [(zlib.crc32(f"{module} {name} {place}".encode()) >> 1) ^ seed for place in range(len(terms))]
        rows = parts if name == "A" else [x.T for x in parts]  # units are rows on both sides
        kept = [dropped(x, density, key) for x, key in zip(rows, keys, strict=True)]
        factors.append(summed(kept, weights) if consensus == "linear" else elected(kept, weights, majority))
    return factors[1].T @ factors[0]


def dropped(x: Tensor, density: float, key: int) -> Tensor:
    """Entry i stays, divided by the density, where the hash of i and the key falls below it."""
    kept = [lowbias32(i ^ lowbias32(key)) % 2**31 < round(density * 2**31) for i in range(x.numel())]
    return torch.where(torch.tensor(kept).view(x.shape), x / density, 0.0)


def lowbias32(x: int) -> int:
    """Wellons (2018), "Prospecting for hash functions": a mixing of 32 bits."""
    x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
    x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
    return x ^ x >> 16
