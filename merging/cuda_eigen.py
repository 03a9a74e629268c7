"""Small symmetric problems on the GPU: pivoted Cholesky and one-sided Jacobi, one Triton program a matrix.

cuSOLVER takes 0.3 ms for each 64 × 64 eigenproblem of a batch, one after another; here all run side by side.
Warps lie along the axis that is summed up, so that sums are within threads and what is exchanged stays within a warp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SWEEPS = 12  # at most; four to seven are usual
# Jacobi converges quadratically: a sweep that finds no cosine over this leaves none over a float32's rounding.
_SETTLED = 1e-4
_TILE = 32  # columns of a root that are read at a time


def cholesky(gram_PNN: Tensor, floor: float, *, inverse: bool = True) -> tuple[Tensor, Tensor]:
    """R with G = R Rᵀ and W with W G Wᵀ = 1, by pivoted Cholesky decomposition: both (P, N, N) float64.

    The vector with the largest part of its squared length left is taken again and again, while that part is over `floor`;
    columns of R and rows of W beyond are 0.

    Args:
        gram_PNN: positive semidefinite, float64 on the GPU; N at most 128.
        inverse: whether W is wanted; else it is left empty.
    """
    problems, size, _ = gram_PNN.shape
    column_PNN = torch.empty_like(gram_PNN, memory_format=torch.contiguous_format)
    inverse_PNN = torch.empty_like(column_PNN) if inverse else column_PNN.new_empty(0)
    _cholesky[(problems,)](
        gram_PNN.contiguous(), column_PNN, inverse_PNN, size, floor,
        NP=max(16, triton.next_power_of_2(size)), TILE=_TILE, INVERSE=inverse, num_warps=4, num_stages=1,
    )  # fmt: skip
    return column_PNN.mT, inverse_PNN


def eigenrows(x_PNN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (P, N), and eigenvectors as rows, (P, N, N), of positive semidefinite matrices; float64.

    X = R Rᵀ with R = V Σ Uᵀ has the eigenvectors V; one-sided Jacobi on the columns of R gives V Σ. A pivoted R makes that
    converge in few sweeps whatever the spectrum (Drmač and Veselić, SIAM J. Matrix Anal. Appl. 29, 2008).
    Eigenvalues whose square roots are below 5e-7 of the largest's become 0, and so do their rows.

    Args:
        x_PNN: float64 on the GPU; N at most 128.
    """
    problems, size, _ = x_PNN.shape
    padded = max(16, triton.next_power_of_2(size))
    root_PNN, _ = cholesky(x_PNN, 2 * size * torch.finfo(torch.float64).eps, inverse=False)
    value_PN, row_PNN = x_PNN.new_empty(problems, size), x_PNN.new_empty(problems, size, size)
    tolerance = 4 * torch.finfo(torch.float32).eps
    _jacobi[(problems,)](
        root_PNN.mT, value_PN, row_PNN, size, _SWEEPS, tolerance, _SETTLED, NP=padded, num_warps=min(4, padded // 16)
    )
    return value_PN, row_PNN


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator]
def _cholesky(  # type: ignore[no-untyped-def]  # Triton's own types
    gram_ptr, column_ptr, inverse_ptr, size, floor, NP: tl.constexpr, TILE: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    """G = R Rᵀ and W G Wᵀ = 1. gram (P, N, N) float64: read; column, Rᵀ, and inverse, W, (P, N, N) float64: written.

    With p the pivot of a step and l the steps before, R_·l and W_l· are that of p in what is left of the vectors:
    column = (G_p· − Σ_l R_pl R_·l) / √d and row = (1_p − Σ_l R_pl W_l·) / √d, d the squared length left of p.
    """
    i = tl.arange(0, NP)
    here = i < size
    start = tl.program_id(0).to(tl.int64) * size * size
    gram, columns, rows = gram_ptr + start, column_ptr + start, inverse_ptr + start
    square = tl.load(gram + i * (size + 1), mask=here, other=0.0)
    unit = tl.where(square > 0, 1 / square, 0.0)
    left = tl.where(square > 0, 1.0, 0.0).to(tl.float64)  # what is left of each squared length; below 0 once it is taken
    for step in range(size):
        most, pivot = tl.max(left, 0, return_indices=True)
        column = tl.load(gram + pivot * size + i, mask=here, other=0.0)
        row = tl.where(i == pivot, 1.0, 0.0).to(tl.float64)
        for first in range(0, step, TILE):
            before = first + tl.arange(0, TILE)
            inside = (before < step)[:, None] & here[None, :]
            place = before[:, None] * size + i[None, :]
            factor = tl.load(columns + before * size + pivot, mask=before < step, other=0.0)[:, None]
            column -= tl.sum(factor * tl.load(columns + place, mask=inside, other=0.0), 0)
            if INVERSE:
                row -= tl.sum(factor * tl.load(rows + place, mask=inside, other=0.0), 0)
        scale = tl.where(most > floor, tl.rsqrt(most * tl.sum(tl.where(i == pivot, square, 0.0), 0)), 0.0)
        column = tl.where(left >= 0, column * scale, 0.0)
        left = tl.where(i == pivot, -1.0, left - column * column * unit)
        tl.store(columns + step * size + i, column, mask=here)
        if INVERSE:
            tl.store(rows + step * size + i, row * scale, mask=here)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["size", "sweeps"])  # type: ignore[untyped-decorator]
def _jacobi(  # type: ignore[no-untyped-def]  # Triton's own types
    x_ptr, value_ptr, row_ptr, size, sweeps, tolerance, settled, NP: tl.constexpr
):  # fmt: skip
    """Rotations make the rows of X orthogonal: Σ Vᵀ. They are paired by XOR, so that N − 1 rounds meet all pairs.

    One-sided Jacobi (Hestenes, 1958), in float32.

    Pointers:
        x (P, N, N) float64: read. value (P, N) float64: Σ², descending; row (P, N, N) float64: Vᵀ; written.
    """
    i = tl.arange(0, NP)
    start = tl.program_id(0).to(tl.int64) * size
    inside = (i[:, None] < size) & (i[None, :] < size)
    exact = tl.load(x_ptr + start * size + i[None, :] * size + i[:, None], mask=inside, other=0.0)
    largest = tl.max(tl.max(tl.abs(exact), 0), 0)
    scale = tl.where(largest > 0, largest, 1.0)
    x = (exact / scale).to(tl.float32)
    floor = tl.max(tl.sum(x * x, 0), 0) * tolerance * tolerance  # rows below are rounding errors and do not count
    sweep = 0
    worst = settled + 1.0
    while (sweep < sweeps) & (worst > settled):
        cosines = tl.zeros((NP,), tl.float32)
        xx = tl.sum(x * x, 0)
        for mask in range(1, NP):
            partner = i ^ mask
            y = tl.gather(x, tl.broadcast_to(partner[None, :], (NP, NP)), 1)
            yy = tl.gather(xx, partner, 0)
            xy = tl.sum(x * y, 0)
            cosine = tl.abs(xy) * tl.rsqrt(tl.maximum(xx * yy, 1e-30))
            turn = (cosine > tolerance) & (tl.minimum(xx, yy) > floor)
            role = tl.where(i < partner, 1.0, -1.0)
            tau = role * (yy - xx) / (2 * tl.where(turn, xy, 1.0))
            t = tl.where(tau >= 0, 1.0, -1.0) / (tl.abs(tau) + tl.sqrt(1 + tau * tau))
            t = tl.where(turn, role * t, 0.0)
            c = tl.rsqrt(1 + t * t)
            x = c[None, :] * x - (c * t)[None, :] * y
            xx = xx - t * xy
            cosines = tl.maximum(cosines, tl.where(turn, cosine, 0.0))
        worst = tl.max(cosines, 0)
        sweep += 1
    square = tl.sum(x * x, 0)
    sigma = tl.where(square > floor, tl.sqrt(square), 0.0)
    above = (sigma[:, None] > sigma[None, :]) | ((sigma[:, None] == sigma[None, :]) & (i[:, None] < i[None, :]))
    place = tl.sum((above & (i[:, None] < size)).to(tl.int32), 0)
    x = x * tl.where(sigma > 0, 1 / sigma, 0.0)[None, :]
    tl.store(row_ptr + start * size + place[None, :] * size + i[:, None], x.to(tl.float64), mask=inside)
    sigma = sigma.to(tl.float64) * scale
    tl.store(value_ptr + start + place, sigma * sigma, mask=i < size)
