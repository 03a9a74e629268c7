"""svd, naively: the dense weighted sum, truncated to its k largest singular values."""

from collections.abc import Sequence

import torch
from reference.cat import cat
from torch import Tensor

from merging import LoraModule


def svd(terms: Sequence[tuple[LoraModule, float]], k: int) -> Tensor:
    u, sigma, vt = torch.linalg.svd(cat(terms), full_matrices=False)
    return (u[:, :k] * sigma[:k]) @ vt[:k]
