"""The core-space family, naively: dense float64 ΔW and their singular value decompositions."""

from collections.abc import Sequence

import torch
from reference.cat import cat
from reference.elementwise import elected, trimmed
from torch import Tensor

from merging import LoraModule

Terms = Sequence[tuple[LoraModule, float]]


def nearest(matrix: Tensor, k: int) -> Tensor:
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * sigma[:k]) @ v[:k]


def iso(terms: Terms, k: int) -> Tensor:
    u, sigma, v = torch.linalg.svd(cat(terms), full_matrices=False)
    return sigma[:k].mean() * u[:, :k] @ v[:k]


def core_ties(terms: Terms, k: int, density: float) -> Tensor:
    """In the singular bases of the units, each brought to length 1 first, of [B_1 … B_T] and [A_1; …; A_T]."""
    left = torch.linalg.svd(_normalised(torch.cat([m.b.double().T for m, _ in terms])).T, full_matrices=False)[0]
    right = torch.linalg.svd(_normalised(torch.cat([m.a.double() for m, _ in terms])), full_matrices=False)[2]
    cores = [trimmed(left.T @ (weight * module.delta()) @ right.T, density) for module, weight in terms]
    return nearest(left @ elected(cores, [1.0] * len(cores), "total") @ right, k)


def tsv(terms: Terms, k: int) -> Tensor:
    parts = []
    for module, weight in terms:
        u, sigma, v = torch.linalg.svd(weight * module.delta(), full_matrices=False)
        parts.append((u[:, : module.rank], sigma[: module.rank], v[: module.rank]))
    left, right = (
        _procrustes(torch.cat([part[0] for part in parts], 1)),
        _procrustes(torch.cat([part[2] for part in parts]).T),
    )
    return nearest(left @ torch.diag(torch.cat([part[1] for part in parts])) @ right.T, k)


def _procrustes(matrix: Tensor) -> Tensor:
    p, _, q = torch.linalg.svd(matrix, full_matrices=False)
    return p @ q


def _normalised(rows: Tensor) -> Tensor:
    return rows / torch.linalg.norm(rows, dim=1, keepdim=True)
