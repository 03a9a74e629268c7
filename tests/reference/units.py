"""LoRA-LEGO's minimal semantic units as explicit vectors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging import LoraModule

Unit = tuple[Tensor, Tensor]


def units_of(module: LoraModule, weight: float) -> list[Unit]:
    """Row i of A with column i of B, for each i: √|w c| folded into both, and the sign of w c into b."""
    coefficient = weight * module.scaling
    root = math.sqrt(abs(coefficient))
    sign = -1.0 if coefficient < 0 else 1.0
    return [(root * module.a[i].double(), sign * root * module.b[:, i].double()) for i in range(module.rank)]


def pool(terms: Sequence[tuple[LoraModule, float]], canonical: bool = False) -> list[Unit]:
    """The units of all adapters, in the order of the terms."""
    units = [unit for module, weight in terms for unit in units_of(module, weight)]
    return [canonicalised(unit) for unit in units] if canonical else units


def canonicalised(unit: Unit) -> Unit:
    """The same outer product with the freedom of sign and scale removed: largest |a| entry positive, ‖a‖ = ‖b‖."""
    a, b = unit
    if a[a.abs().argmax()] < 0:
        a, b = -a, -b
    length_a, length_b = a.norm(), b.norm()
    if length_a > 0 and length_b > 0:
        balance = math.sqrt(length_b / length_a)
        a, b = balance * a, b / balance
    return a, b


def as_points(units: Sequence[Unit], unit_length: bool = False) -> Tensor:
    """(N, d_in + d_out): what k-means clusters; with `unit_length`, a and b are each brought to length 1."""
    if unit_length:
        units = [(_normalised(a), _normalised(b)) for a, b in units]
    return torch.stack([torch.cat([a, b]) for a, b in units])


def _normalised(vector: Tensor) -> Tensor:
    return vector / vector.norm() if vector.norm() > 0 else vector
