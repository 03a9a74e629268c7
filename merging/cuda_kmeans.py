"""k-means on the GPU: all rounds of all problems in one Triton kernel, one program a module and restart.

The same algorithm as kmeans.py, in float32. Nothing comes back to the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from merging.cuda_kernels import exact_dot


def joint_gram(gram_a_LNN: Tensor, gram_b_LNN: Tensor, fold_a_LN: Tensor, fold_b_LN: Tensor) -> Tensor:
    """Inner products of the units [f_a a; f_b b]: f_a f_aᵀ ∘ G_A + f_b f_bᵀ ∘ G_B, (L, N, N) float64, in one pass."""
    layers, points, _ = gram_a_LNN.shape
    out_LNN = torch.empty_like(gram_a_LNN)
    _joint_gram[(layers, triton.cdiv(points * points, 1024))](
        gram_a_LNN, gram_b_LNN, fold_a_LN.contiguous(), fold_b_LN.contiguous(), out_LNN, points, TILE=1024
    )
    return out_LNN


def kmeans_restarts(gram_LNN: Tensor, draws_KR: Tensor, rounds: int, noise: float) -> tuple[Tensor, Tensor]:
    """k-means++ and Lloyd's rounds from each column of draws: labels (L, R, N) int64 and inertias (L, R) float32.

    Args:
        gram_LNN: float64, contiguous, on the GPU; N at most 1024.
        draws_KR: uniform numbers in [0, 1), one a centre and restart; float64 on the GPU.
        rounds: Lloyd's rounds at most.
        noise: squared distances below this part of the points' own squared norms count as 0.
    """
    layers, points, _ = gram_LNN.shape
    k, restarts = draws_KR.shape
    padded, padded_k = max(16, triton.next_power_of_2(points)), max(16, triton.next_power_of_2(k))

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=gram_LNN.device)

    power_LN, sorted_LNN = torch.empty_like(gram_LNN[:, 0]), room(layers, points, points, dtype=torch.float32)
    order_LN = room(layers, points, dtype=torch.int32)
    _sort[(layers,)](
        gram_LNN,
        power_LN,
        order_LN,
        sorted_LNN,
        points,
        NP=padded,
        TILE=max(1, 4096 // padded),
        num_warps=4 if padded <= 64 else 8,
    )
    problems = layers * restarts
    label_PN, distance_PN = room(problems, padded, dtype=torch.int32), room(problems, padded, dtype=torch.float32)
    size_PK, own_PK = room(problems, padded_k, dtype=torch.float32), room(problems, padded_k, dtype=torch.float32)
    cross_PNK = room(problems, padded, padded_k, dtype=torch.float32)
    out_LRN, inertia_LR = room(layers, restarts, points, dtype=torch.int64), room(layers, restarts, dtype=torch.float32)
    _kmeans[(problems,)](
        sorted_LNN, order_LN, draws_KR, label_PN, distance_PN, size_PK, own_PK, cross_PNK, out_LRN, inertia_LR,
        points, k, restarts, rounds, noise, NP=padded, KP=padded_k, TILE=min(padded, 64), TILE_K=min(padded_k, 64),
        num_warps=4 if padded <= 64 else 8, num_stages=1,
    )  # fmt: skip
    return out_LRN, inertia_LR


@triton.jit  # type: ignore[untyped-decorator]
def _joint_gram(  # type: ignore[no-untyped-def]  # Triton's own types
    gram_a_ptr, gram_b_ptr, fold_a_ptr, fold_b_ptr, out_ptr, points, TILE: tl.constexpr
):  # fmt: skip
    """gram_a, gram_b (L, N, N), fold_a, fold_b (L, N) float64: read; out (L, N, N) float64: written."""
    layer = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < points * points
    row, column = layer * points + place // points, layer * points + place % points
    place = layer * points * points + place
    a = (
        tl.load(fold_a_ptr + row, mask=inside)
        * tl.load(gram_a_ptr + place, mask=inside)
        * tl.load(fold_a_ptr + column, mask=inside)
    )
    b = (
        tl.load(fold_b_ptr + row, mask=inside)
        * tl.load(gram_b_ptr + place, mask=inside)
        * tl.load(fold_b_ptr + column, mask=inside)
    )
    tl.store(out_ptr + place, a + b, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sort(  # type: ignore[no-untyped-def]  # Triton's own types
    gram_ptr, power_ptr, order_ptr, sorted_ptr, points, NP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Points by descending norm in float32, then by descending Σ_j G_ij², then as they come.

    Pointers:
        gram (L, N, N) float64: read.
        power (L, N) float64: Σ_j G_ij²; order (L, N) int32: points in their new order; sorted (L, N, N) float32: written.
    """
    layer = tl.program_id(0).to(tl.int64)
    gram = gram_ptr + layer * points * points
    power_row = power_ptr + layer * points
    order_row = order_ptr + layer * points
    i = tl.arange(0, NP)
    for start in range(0, points, TILE):
        rows = start + tl.arange(0, TILE)
        tile = tl.load(
            gram + rows[:, None] * points + i[None, :], mask=(rows < points)[:, None] & (i < points)[None, :], other=0.0
        )
        tl.store(power_row + rows, tl.sum(tile * tile, 1), mask=rows < points)
    tl.debug_barrier()
    norm = tl.load(gram + i * (points + 1), mask=i < points, other=0.0).to(tl.float32)
    power = tl.load(power_row + i, mask=i < points, other=0.0)
    for start in range(0, points, TILE):
        rows = start + tl.arange(0, TILE)
        norm_r = tl.load(gram + rows * (points + 1), mask=rows < points, other=0.0).to(tl.float32)[:, None]
        power_r = tl.load(power_row + rows, mask=rows < points, other=0.0)[:, None]
        first = (power[None, :] > power_r) | ((power[None, :] == power_r) & (i[None, :] < rows[:, None]))
        first = (norm[None, :] > norm_r) | ((norm[None, :] == norm_r) & first)
        place = tl.sum((first & (i < points)[None, :]).to(tl.int32), 1)
        tl.store(order_row + place, rows, mask=rows < points)
    tl.debug_barrier()
    source = tl.load(order_row + i, mask=i < points, other=0)
    for start in range(0, points, TILE):
        rows = start + tl.arange(0, TILE)
        source_r = tl.load(order_row + rows, mask=rows < points, other=0)
        inside = (rows < points)[:, None] & (i < points)[None, :]
        tile = tl.load(gram + source_r[:, None] * points + source[None, :], mask=inside)
        tl.store(sorted_ptr + layer * points * points + rows[:, None] * points + i[None, :], tile.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["k", "restarts", "rounds"])  # type: ignore[untyped-decorator]
def _kmeans(  # type: ignore[no-untyped-def]  # Triton's own types
    gram_ptr, order_ptr, draws_ptr, label_ptr, distance_ptr, size_ptr, own_ptr, cross_ptr, out_ptr, inertia_ptr,
    points, k, restarts, rounds, noise,
    NP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """inertia = Σ_i ‖x_i − μ_label(i)‖² at a local minimum, from G_ij = <x_i, x_j> alone.

    Sums over a cluster's members are products with a matrix of zeros and ones: by exact_dot, on the tensor cores.

    Pointers:
        gram (L, N, N) float32, order (L, N) int32, draws (K, R) float64: read.
        label (L R, NP) int32, distance (L R, NP), size (L R, KP), own (L R, KP), cross (L R, NP, KP) float32: scratch.
        out (L, R, N) int64, inertia (L, R) float32: written.
    """
    problem = tl.program_id(0)
    gram = gram_ptr + (problem // restarts).to(tl.int64) * points * points
    labels = label_ptr + problem * NP
    distances = distance_ptr + problem * NP
    sizes = size_ptr + problem * KP
    owns = own_ptr + problem * KP
    crosses = cross_ptr + problem.to(tl.int64) * NP * KP
    i = tl.arange(0, NP)
    every = tl.arange(0, KP)
    valid = i < points
    norm = tl.load(gram + i * (points + 1), mask=valid, other=0.0)

    # k-means++; each point's nearest centre so far is kept on the way.
    weight = valid.to(tl.float32)
    taken = i >= points
    nearest = tl.full((NP,), float("inf"), tl.float32)
    gap = tl.full((NP,), float("inf"), tl.float32)
    label = tl.zeros((NP,), tl.int32)
    for centre in range(k):
        if tl.sum(weight) == 0:  # every point left coincides with a centre: any will do
            weight = tl.where(taken, 0.0, 1.0)
        cumulative = tl.cumsum(weight, 0)
        draw = tl.load(draws_ptr + centre * restarts + problem % restarts).to(tl.float32) * tl.max(cumulative)
        last = tl.max(tl.where(weight > 0, i, 0))  # rounding must not lead to a point of no weight
        index = tl.minimum(tl.sum(((cumulative <= draw) & valid).to(tl.int32)), last)
        row = tl.load(gram + index * points + i, mask=valid, other=0.0)
        norm_centre = tl.load(gram + index * points + index)
        scale = norm + norm_centre
        away = scale - 2 * row
        label = tl.where(away < nearest, centre, label)
        nearest = tl.minimum(nearest, away)
        gap = tl.minimum(gap, tl.where(away > noise * scale, away, 0.0))
        taken = taken | (i == index)
        gap = tl.where(taken, 0.0, gap)
        weight = gap
    tl.store(labels + i, tl.where(valid, label, -1))
    tl.store(distances + i, tl.where(valid, nearest, -1.0))
    tl.debug_barrier()

    changed = 1
    done = 0
    while (done <= rounds) & (changed > 0):
        count = tl.zeros((KP,), tl.float32)
        for start in range(0, NP, 16):
            member = tl.load(labels + start + tl.arange(0, 16))[:, None] == every[None, :]
            count += tl.sum(member.to(tl.float32), 0)
        if (done < rounds) & (tl.sum(((count == 0) & (every < k)).to(tl.int32)) > 0):
            # Each empty cluster takes the point farthest from its own centre that is left.
            label = tl.load(labels + i)
            distance = tl.load(distances + i)
            for empty in range(k):
                if tl.sum(tl.where(every == empty, count, 0.0)) == 0:
                    farthest = tl.argmax(distance, 0)
                    loser = tl.sum(tl.where(i == farthest, label, 0))
                    count += tl.where(every == empty, 1.0, 0.0) - tl.where(every == loser, 1.0, 0.0)
                    label = tl.where(i == farthest, empty, label)
                    distance = tl.where(i == farthest, -1.0, distance)
            tl.debug_barrier()
            tl.store(labels + i, label)
        tl.store(sizes + every, count)
        tl.debug_barrier()

        # <x_i, μ_c> and ‖μ_c‖²
        spread = 0.0
        for first in range(0, KP, TILE_K):
            c = first + tl.arange(0, TILE_K)
            size = tl.load(sizes + c)
            share = 1.0 / tl.maximum(size, 1.0)
            own = tl.zeros((TILE_K,), tl.float32)
            for start in range(0, NP, TILE):
                rows = start + tl.arange(0, TILE)
                cross = tl.zeros((TILE, TILE_K), tl.float32)
                for other in range(0, NP, TILE):
                    columns = other + tl.arange(0, TILE)
                    inside = (rows < points)[:, None] & (columns < points)[None, :]
                    tile = tl.load(gram + rows[:, None] * points + columns[None, :], mask=inside, other=0.0)
                    member = (tl.load(labels + columns)[:, None] == c[None, :]).to(tl.bfloat16)
                    cross = exact_dot(tile, member, cross)
                cross = cross * share[None, :]
                tl.store(crosses + rows[:, None] * KP + c[None, :], cross)
                own += tl.sum(tl.where(tl.load(labels + rows)[:, None] == c[None, :], cross, 0.0), 0) * share
            tl.store(owns + c, own)
            spread += tl.sum(own * size)
        tl.store(inertia_ptr + problem, tl.sum(norm) - spread)
        tl.debug_barrier()

        changed = 0
        if done < rounds:
            for start in range(0, NP, TILE):
                rows = start + tl.arange(0, TILE)
                norm_tile = tl.load(gram + rows * (points + 1), mask=rows < points, other=0.0)
                least = tl.full((TILE,), float("inf"), tl.float32)
                new = tl.zeros((TILE,), tl.int32)
                for first in range(0, KP, TILE_K):
                    c = first + tl.arange(0, TILE_K)
                    away = (
                        norm_tile[:, None] - 2 * tl.load(crosses + rows[:, None] * KP + c[None, :]) + tl.load(owns + c)[None, :]
                    )
                    away = tl.where((tl.load(sizes + c) > 0)[None, :], away, float("inf"))
                    here = tl.min(away, 1)
                    new = tl.where(here < least, first + tl.argmin(away, 1), new)
                    least = tl.minimum(least, here)
                new = tl.where(rows < points, new, -1)
                changed += tl.sum((new != tl.load(labels + rows)).to(tl.int32))
                tl.debug_barrier()
                tl.store(labels + rows, new)
                tl.store(distances + rows, tl.where(rows < points, least, -1.0))
            tl.debug_barrier()
        done += 1
    place = tl.load(order_ptr + (problem // restarts) * points + i, mask=valid, other=0)
    tl.store(out_ptr + problem.to(tl.int64) * points + place, tl.load(labels + i).to(tl.int64), mask=valid)
