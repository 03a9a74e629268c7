"""k-means on the GPU: all rounds of all problems in one Triton kernel, one program a module and restart.

The same algorithm as kmeans.py, in float32. Nothing comes back to the host before the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def kmeans_restarts(gram_LNN: Tensor, draws_KR: Tensor, rounds: int, noise: float) -> tuple[Tensor, Tensor]:
    """k-means++ and Lloyd's rounds from each row of draws: labels (L, R, N) int64 and inertias (L, R) float32.

    Args:
        gram_LNN: float32, contiguous, on the GPU; N at most 256.
        draws_KR: uniform numbers in [0, 1), one a centre and restart; float32 on the GPU.
        rounds: Lloyd's rounds at most.
        noise: squared distances below this part of the points' own squared norms count as 0.
    """
    layers, points, _ = gram_LNN.shape
    k, restarts = draws_KR.shape
    padded = max(16, triton.next_power_of_2(points))
    label_PN = torch.empty(layers * restarts, padded, dtype=torch.int32, device=gram_LNN.device)
    distance_PN = torch.empty(layers * restarts, padded, dtype=torch.float32, device=gram_LNN.device)
    inertia_P = torch.empty(layers * restarts, dtype=torch.float32, device=gram_LNN.device)
    _kmeans[(layers * restarts,)](
        gram_LNN, draws_KR, label_PN, distance_PN, inertia_P, points, k, restarts, rounds, noise,
        NP=padded, KP=max(16, triton.next_power_of_2(k)), TILE=min(padded, 32), num_warps=4 if padded <= 64 else 8,
    )  # fmt: skip
    return label_PN[:, :points].long().view(layers, restarts, points), inertia_P.view(layers, restarts)


@triton.jit  # type: ignore[untyped-decorator]
def _kmeans(  # type: ignore[no-untyped-def]  # Triton's own types
    gram_ptr, draws_ptr, label_ptr, distance_ptr, inertia_ptr, points, k, restarts, rounds, noise,
    NP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """inertia = Σ_i ‖x_i − μ_label(i)‖² at a local minimum, from G_ij = <x_i, x_j> alone.

    Pointers:
        gram (L, N, N) float32, draws (K, R) float32: read.
        label (L R, NP) int32, distance (L R, NP) float32, inertia (L R) float32: written.
    """
    problem = tl.program_id(0)
    gram = gram_ptr + (problem // restarts).to(tl.int64) * points * points
    labels = label_ptr + problem * NP
    distances = distance_ptr + problem * NP
    i = tl.arange(0, NP)
    c = tl.arange(0, KP)
    valid = i < points
    norm = tl.load(gram + i * points + i, mask=valid, other=0.0)

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
        draw = tl.load(draws_ptr + centre * restarts + problem % restarts) * tl.max(cumulative)
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

    count = tl.zeros((KP,), tl.float32)
    changed = 1
    done = 0
    while (done <= rounds) & (changed > 0):
        label = tl.load(labels + i)
        count = tl.sum((label[:, None] == c[None, :]).to(tl.float32), 0)
        if (done < rounds) & (tl.sum(((count == 0) & (c < k)).to(tl.int32)) > 0):
            # Each empty cluster takes the point farthest from its own centre that is left.
            distance = tl.load(distances + i)
            for empty in range(k):
                if tl.sum(tl.where(c == empty, count, 0.0)) == 0:
                    farthest = tl.argmax(distance, 0)
                    label = tl.where(i == farthest, empty, label)
                    distance = tl.where(i == farthest, -1.0, distance)
            count = tl.sum((label[:, None] == c[None, :]).to(tl.float32), 0)
            tl.debug_barrier()
            tl.store(labels + i, label)
            tl.debug_barrier()
        share = 1.0 / tl.maximum(count, 1.0)
        mean = tl.where(label[:, None] == c[None, :], share[None, :], 0.0)
        own = tl.zeros((KP,), tl.float32)  # ‖μ_c‖²
        for start in range(0, NP, TILE):
            rows = start + tl.arange(0, TILE)
            inside = (rows < points)[:, None] & valid[None, :]
            tile = tl.load(gram + rows[:, None] * points + i[None, :], mask=inside, other=0.0)
            cross = tl.dot(tile, mean, input_precision="ieee")
            member = tl.load(labels + rows)[:, None] == c[None, :]
            own += tl.sum(tl.where(member, cross * share[None, :], 0.0), 0)
        tl.store(inertia_ptr + problem, tl.sum(norm) - tl.sum(own * count))
        changed = 0
        if done < rounds:
            for start in range(0, NP, TILE):
                rows = start + tl.arange(0, TILE)
                inside = (rows < points)[:, None] & valid[None, :]
                tile = tl.load(gram + rows[:, None] * points + i[None, :], mask=inside, other=0.0)
                cross = tl.dot(tile, mean, input_precision="ieee")
                norm_tile = tl.load(gram + rows * points + rows, mask=rows < points, other=0.0)
                away = norm_tile[:, None] - 2 * cross + own[None, :]
                away = tl.where((count > 0)[None, :], away, float("inf"))
                new = tl.where(rows < points, tl.argmin(away, 1), -1)
                changed += tl.sum((new != tl.load(labels + rows)).to(tl.int32))
                tl.debug_barrier()
                tl.store(labels + rows, new)
                tl.store(distances + rows, tl.where(rows < points, tl.min(away, 1), -1.0))
            tl.debug_barrier()
        done += 1
