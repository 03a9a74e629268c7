"""cat, naively: ΔW = Σ_t w_t c_t B_t A_t, dense, in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging import LoraModule


def cat(terms: Sequence[tuple[LoraModule, float]]) -> Tensor:
    d_out, d_in = terms[0][0].shape
    total = torch.zeros(d_out, d_in, dtype=torch.float64)
    for module, weight in terms:
        total += weight * module.scaling * (module.b.double() @ module.a.double())
    return total
