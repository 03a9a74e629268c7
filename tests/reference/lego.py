"""lego, naively, for given clusters: means of explicit units, reweighted one after another."""

import math
from collections.abc import Sequence

import torch
from reference.units import pool
from torch import Tensor

from merging import LoraModule


def lego(
    terms: Sequence[tuple[LoraModule, float]],
    labels: Sequence[int],
    k: int,
    *,
    norm: str = "inf",
    output: str = "sqrt-r/k",
    canonical: bool = False,
) -> Tensor:
    """The merged ΔW.

    Args:
        labels: the cluster, 0 to k − 1, of each unit in the order of the terms.
    """
    units = pool(terms, canonical)
    order = {"inf": math.inf, "2": 2}[norm]
    d_out, d_in = terms[0][0].shape
    delta = torch.zeros(d_out, d_in, dtype=torch.float64)
    for cluster in range(k):
        members = [torch.cat(unit) for unit, label in zip(units, labels, strict=True) if label == cluster]
        if not members:
            continue
        centre = sum(members) / len(members)
        length = torch.linalg.vector_norm(centre, order)
        wanted = sum(torch.linalg.vector_norm(member, order) for member in members) / len(members)
        if length > 0:
            centre = centre * (wanted / length)
        delta += torch.outer(centre[d_in:], centre[:d_in])
    mean_rank = sum(module.rank for module, _ in terms) / len(terms)
    gain = {"sqrt-r/k": math.sqrt(mean_rank / k), "sqrt-n/k": math.sqrt(len(units) / k), "none": 1.0}[output]
    return gain * delta
