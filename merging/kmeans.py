"""k-means on Gram matrices: many small clusterings at once, without ever touching a vector.

The squared distance of point i to the mean of cluster c needs inner products only:
‖x_i − μ_c‖² = G_ii − 2 mean_{j∈c} G_ij + mean_{j,l∈c} G_jl.

Shape suffixes: P  problems (modules × restarts)   N  points of a problem   K  clusters.
"""

from functools import cache

import torch
from torch import Tensor

CUDA_MOST_POINTS = 1024  # of a problem that the GPU's kernels take: a program holds some numbers for each

# Squared distances below this part of the points' own squared norms are float32 noise of the Gram matrix.
_NOISE = 1e-6


class NotCapturable(Exception):  # noqa: N818  (of the moment, not of the step)
    """A CUDA graph was to be captured of a step that speaks with the host: run it eagerly."""


def kmeans(gram_LNN: Tensor, k: int, *, restarts: int, rounds: int, seed: int) -> Tensor:
    """Cluster the N points of each of L problems into k clusters: k-means++, then Lloyd's rounds; best inertia wins.

    Points are taken in the order of their norms, and those of equal norm in that of Σ_j <x_i, x_j>², so the result does
    not depend on the order they come in.

    Args:
        gram_LNN: inner products of the points, float64, on any device.
        k: number of clusters, 1 to N. With k = N every point is its own cluster.
        restarts: independent starts, of which the one with least inertia is kept.
        rounds: Lloyd's rounds at most.
        seed: of the k-means++ draws; equal seeds give equal clusters on every device.

    Returns:
        (L, N) int64, the cluster of each point.

    Raises:
        NotCapturable: for N over 1024, while a CUDA graph is captured.
    """
    layers, points, _ = gram_LNN.shape
    if k == points:
        return torch.arange(points, device=gram_LNN.device).expand(layers, points)
    draws_KR = _draws(k, restarts, seed, gram_LNN.device)
    if gram_LNN.is_cuda and points <= CUDA_MOST_POINTS:
        from merging.cuda_kmeans import kmeans_restarts  # Triton is there with CUDA only

        label_LRN, inertia_LR = kmeans_restarts(gram_LNN, draws_KR, rounds, _NOISE)
    else:
        if gram_LNN.is_cuda and torch.cuda.is_current_stream_capturing():
            raise NotCapturable(f"k-means of {points} points")
        label_LRN, inertia_LR = _kmeans_restarts(gram_LNN, draws_KR, rounds)
    best_L11 = inertia_LR.argmin(dim=1)[:, None, None]
    return label_LRN.gather(1, best_L11.expand(-1, 1, points)).squeeze(1)


@cache  # stays where it is: captured graphs read it
def _draws(k: int, restarts: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(k, restarts, generator=generator, dtype=torch.float64).to(device)


def _kmeans_restarts(gram_LNN: Tensor, draws_KR: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """k-means++ and Lloyd's rounds from each column of draws: labels (L, R, N) int64 and inertias (L, R) float64."""
    layers, points, _ = gram_LNN.shape
    k, restarts = draws_KR.shape
    order_LN = gram_LNN.square().sum(dim=2).argsort(dim=1, descending=True, stable=True)
    norm_LN = gram_LNN.diagonal(dim1=1, dim2=2).gather(1, order_LN).float()  # lengths that differ by rounding are equal
    order_LN = order_LN.gather(1, norm_LN.argsort(dim=1, descending=True, stable=True))
    sorted_LNN = gram_LNN.gather(1, order_LN[:, :, None].expand_as(gram_LNN))
    sorted_LNN = sorted_LNN.gather(2, order_LN[:, None, :].expand_as(gram_LNN))
    gram_PNN = sorted_LNN.repeat_interleave(restarts, dim=0)
    label_PN = lloyd(gram_PNN, plus_plus(gram_PNN, draws_KR.repeat(1, layers)), rounds)
    inertia_LR = inertia(gram_PNN, label_PN, k).view(layers, restarts)
    label_LRN = label_PN.view(layers, restarts, points)
    return torch.empty_like(label_LRN).scatter_(2, order_LN[:, None, :].expand_as(label_LRN), label_LRN), inertia_LR


def plus_plus(gram_PNN: Tensor, draws_KP: Tensor) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): (P, K) indices of distinct points as first centres.

    Args:
        draws_KP: uniform numbers in [0, 1), one a centre and problem.
    """
    norm_PN = gram_PNN.diagonal(dim1=1, dim2=2)
    weight_PN = torch.ones_like(norm_PN)
    distance_PN = torch.full_like(norm_PN, torch.inf)
    taken_PN = torch.zeros_like(norm_PN, dtype=torch.bool)
    chosen = []
    for draw_P in draws_KP:
        # Where every point left coincides with a centre, any of them will do.
        spent_P1 = weight_PN.sum(dim=1, keepdim=True) == 0
        weight_PN = torch.where(spent_P1, (~taken_PN).double(), weight_PN)
        cumulative_PN = weight_PN.cumsum(dim=1)
        target_P1 = draw_P[:, None] * cumulative_PN[:, -1:]
        index_P1 = torch.searchsorted(cumulative_PN, target_P1, right=True).clamp_(max=norm_PN.shape[1] - 1)
        chosen.append(index_P1)
        taken_PN.scatter_(1, index_P1, True)
        row_PN = gram_PNN.gather(1, index_P1[:, :, None].expand(-1, -1, gram_PNN.shape[2])).squeeze(1)
        scale_PN = norm_PN + norm_PN.gather(1, index_P1)
        new_PN = scale_PN - 2 * row_PN
        new_PN = torch.where(new_PN > _NOISE * scale_PN, new_PN, 0.0)
        distance_PN = torch.minimum(distance_PN, new_PN).masked_fill(taken_PN, 0.0)
        weight_PN = distance_PN
    return torch.cat(chosen, dim=1)


def lloyd(gram_PNN: Tensor, centre_PK: Tensor, rounds: int) -> Tensor:
    """Lloyd's algorithm from points as first centres: (P, N) labels once none changes, or after `rounds`.

    A cluster that loses all its points takes the point farthest from its own centre, as scikit-learn does.
    """
    k = centre_PK.shape[1]
    norm_PN = gram_PNN.diagonal(dim1=1, dim2=2)
    cross_PNK = gram_PNN.gather(2, centre_PK[:, None, :].expand(-1, gram_PNN.shape[1], -1))
    start_PNK = norm_PN[:, :, None] - 2 * cross_PNK + norm_PN.gather(1, centre_PK)[:, None, :]
    own_PN, label_PN = start_PNK.min(dim=2)
    for _ in range(rounds):
        label_PN = _fill_empty(label_PN, own_PN, k)
        own_PN, new_PN = _distances(gram_PNN, label_PN, k).min(dim=2)
        if torch.equal(new_PN, label_PN):
            break
        label_PN = new_PN
    return label_PN


def inertia(gram_PNN: Tensor, label_PN: Tensor, k: int) -> Tensor:
    """(P,) sum of squared distances of the points to their clusters' means."""
    return _distances(gram_PNN, label_PN, k).gather(2, label_PN[:, :, None]).sum(dim=(1, 2))


def means(label_PN: Tensor, k: int) -> Tensor:
    """(P, K, N) float64 matrices that average the members of each cluster; rows of empty clusters are zero."""
    member_PKN = (label_PN[:, None, :] == torch.arange(k, device=label_PN.device)[:, None]).double()
    return member_PKN / member_PKN.sum(dim=2, keepdim=True).clamp_(min=1)


def _distances(gram_PNN: Tensor, label_PN: Tensor, k: int) -> Tensor:
    """(P, N, K) squared distances to the means of the clusters; infinite for empty clusters."""
    mean_PKN = means(label_PN, k)
    cross_PKN = mean_PKN @ gram_PNN
    own_PK = (cross_PKN * mean_PKN).sum(dim=2)
    norm_PN = gram_PNN.diagonal(dim1=1, dim2=2)
    distance_PNK = norm_PN[:, :, None] - 2 * cross_PKN.mT + own_PK[:, None, :]
    return distance_PNK.masked_fill((mean_PKN.sum(dim=2) == 0)[:, None, :], torch.inf)


def _fill_empty(label_PN: Tensor, own_PN: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point that is left farthest from the centre it was assigned to, one after another."""
    empty_PK = means(label_PN, k).sum(dim=2) == 0
    if not bool(empty_PK.any()):
        return label_PN
    farthest_PN = own_PN.argsort(dim=1, descending=True, stable=True)
    rank_PK = empty_PK.cumsum(dim=1) - 1  # the how-manieth empty cluster this is
    label_PN = label_PN.clone()
    problem, cluster = torch.nonzero(empty_PK, as_tuple=True)
    label_PN[problem, farthest_PN[problem, rank_PK[problem, cluster]]] = cluster
    return label_PN
