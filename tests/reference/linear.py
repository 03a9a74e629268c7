"""linear, naively: both factors are summed, each with √|w_t c_t|; the sign of w_t goes to one side only."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging import LoraModule


def linear(terms: Sequence[tuple[LoraModule, float]]) -> Tensor:
    first = terms[0][0]
    sum_a = torch.zeros(first.a.shape, dtype=torch.float64)
    sum_b = torch.zeros(first.b.shape, dtype=torch.float64)
    for module, weight in terms:
        coefficient = weight * module.scaling
        sum_a += math.copysign(math.sqrt(abs(coefficient)), coefficient) * module.a.double()
        sum_b += math.sqrt(abs(coefficient)) * module.b.double()
    return sum_b @ sum_a
