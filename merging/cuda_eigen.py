"""Small symmetric problems on the GPU: pivoted Cholesky and one-sided Jacobi, one Triton program a matrix.

cuSOLVER takes 0.3 ms for each 64 × 64 eigenproblem of a batch, one after another; here all run side by side.
Matrices lie so that what is summed up is summed within threads, and what is exchanged is exchanged within warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SWEEPS = 12  # at most; four to seven are usual
# Jacobi converges quadratically: a sweep that finds no cosine over this leaves none over a float32's rounding.
_SETTLED = 1e-4


def cholesky(gram_PNN: Tensor, floor: float, *, inverse: bool = True) -> tuple[Tensor, Tensor]:
    """R with G = R Rᵀ and W with W G Wᵀ = 1, by pivoted Cholesky decomposition: both (P, N, N) float64.

    The vectors whose inner products G holds are brought to length 1, then the one with most left is taken again and again,
    while its squared length is over `floor`; columns of R and rows of W beyond are 0.

    Args:
        gram_PNN: positive semidefinite, float64 on the GPU; N at most 128.
        inverse: whether W is wanted; else it is left empty.
    """
    problems, size, _ = gram_PNN.shape
    padded = max(16, triton.next_power_of_2(size))
    root_PNN = torch.empty_like(gram_PNN, memory_format=torch.contiguous_format)
    inverse_PNN = torch.empty_like(root_PNN) if inverse else root_PNN.new_empty(0)
    _cholesky[(problems,)](
        gram_PNN.contiguous(), root_PNN, inverse_PNN, size, floor,
        NP=padded, INVERSE=inverse, num_warps=max(2, padded // 8), num_stages=1,
    )  # fmt: skip
    return root_PNN, inverse_PNN


def eigenrows(x_PNN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (P, N), and eigenvectors as rows, (P, N, N), of positive semidefinite matrices; float64.

    X = R Rᵀ with R = V Σ Uᵀ has the eigenvectors V; one-sided Jacobi on the columns of R gives V Σ. A pivoted R makes that
    converge in few sweeps whatever the spectrum (Drmač and Veselić, SIAM J. Matrix Anal. Appl. 29, 2008).
    Rows of eigenvalues that are 0 are 0.

    Args:
        x_PNN: float64 on the GPU; N at most 128.
    """
    problems, size, _ = x_PNN.shape
    padded = max(16, triton.next_power_of_2(size))
    root_PNN, _ = cholesky(x_PNN, 2 * size * torch.finfo(torch.float64).eps, inverse=False)
    value_PN, row_PNN = torch.empty_like(root_PNN[:, 0]), torch.empty_like(root_PNN)
    tolerance = 4 * torch.finfo(torch.float32).eps
    _jacobi[(problems,)](
        root_PNN, value_PN, row_PNN, size, _SWEEPS, tolerance, _SETTLED, NP=padded, num_warps=max(1, padded // 16)
    )
    return value_PN, row_PNN


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator]
def _cholesky(  # type: ignore[no-untyped-def]  # Triton's own types
    gram_ptr, root_ptr, inverse_ptr, size, floor, NP: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    """G = R Rᵀ and W G Wᵀ = 1. gram (P, N, N) float64: read; root, inverse (P, N, N) float64: written."""
    i = tl.arange(0, NP)
    start = tl.program_id(0).to(tl.int64) * size * size
    here = i < size
    norm = tl.sqrt(tl.load(gram_ptr + start + i * (size + 1), mask=here, other=0.0))
    unit = tl.where(norm > 0, 1 / norm, 0.0)
    rest = tl.load(gram_ptr + start + i[:, None] * size + i[None, :], mask=here[:, None] & here[None, :], other=0.0)
    rest = rest * unit[:, None] * unit[None, :]
    left = tl.where(norm > 0, 1.0, 0.0).to(tl.float64)  # what is left of each vector, squared; below 0 once it is taken
    pivots = tl.zeros((NP,), tl.int32)
    scales = tl.zeros((NP,), tl.float64)
    for step in range(size):
        most = tl.max(left, 0)
        pivot = tl.argmax(left, 0)
        scale = tl.where(most > floor, 1 / tl.sqrt(tl.maximum(most, floor)), 0.0)
        column = tl.sum(tl.where(i[:, None] == pivot, rest, 0.0), 0) * scale  # its row, which is the same
        column = tl.where(left >= 0, column, 0.0)
        rest -= column[:, None] * column[None, :]
        left = tl.where(i == pivot, -1.0, left - column * column)
        tl.store(root_ptr + start + i * size + step, norm * column, mask=here)
        if INVERSE:
            pivots = tl.where(i == step, pivot, pivots)
            scales = tl.where(i == step, scale, scales)
    if INVERSE:
        # The same steps again, on what the vectors were mixed of: the identity at first. Both at once need too many registers.
        tl.debug_barrier()
        mixed = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
        for step in range(size):
            pivot = tl.sum(tl.where(i == step, pivots, 0), 0)
            scale = tl.sum(tl.where(i == step, scales, 0.0), 0)
            column = unit * tl.load(root_ptr + start + i * size + step, mask=here, other=0.0)
            row = tl.sum(tl.where(i[:, None] == pivot, mixed, 0.0), 0) * scale
            mixed -= column[:, None] * row[None, :]
            tl.store(inverse_ptr + start + step * size + i, row * unit, mask=here)


@triton.jit(do_not_specialize=["size", "sweeps"])  # type: ignore[untyped-decorator]
def _jacobi(  # type: ignore[no-untyped-def]  # Triton's own types
    x_ptr, value_ptr, row_ptr, size, sweeps, tolerance, settled, NP: tl.constexpr
):  # fmt: skip
    """Rotations from the right make the columns of X orthogonal: V Σ. They are paired by XOR: all pairs in N − 1 rounds.

    One-sided Jacobi (Hestenes, 1958), in float32.

    Pointers:
        x (P, N, N) float64: read. value (P, N) float64: Σ², descending; row (P, N, N) float64: Vᵀ; written.
    """
    i = tl.arange(0, NP)
    start = tl.program_id(0).to(tl.int64) * size
    inside = (i[:, None] < size) & (i[None, :] < size)
    exact = tl.load(x_ptr + start * size + i[:, None] * size + i[None, :], mask=inside, other=0.0)
    largest = tl.max(tl.max(tl.abs(exact), 0), 0)
    scale = tl.where(largest > 0, largest, 1.0)
    x = (exact / scale).to(tl.float32)
    floor = tl.max(tl.sum(x * x, 0), 0) * tolerance * tolerance  # columns below are rounding errors and stay as they are
    sweep = 0
    worst = tl.full((NP,), 1.0, tl.float32)
    while (sweep < sweeps) & (tl.max(worst, 0) > settled):
        worst = tl.zeros((NP,), tl.float32)
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
            worst = tl.maximum(worst, tl.where(turn, cosine, 0.0))
        sweep += 1
    sigma = tl.sqrt(tl.sum(x * x, 0))
    above = (sigma[:, None] > sigma[None, :]) | ((sigma[:, None] == sigma[None, :]) & (i[:, None] < i[None, :]))
    place = tl.sum((above & (i[:, None] < size)).to(tl.int32), 0)
    x = x * tl.where(sigma > 0, 1 / sigma, 0.0)[None, :]
    tl.store(row_ptr + start * size + place[None, :] * size + i[:, None], x.to(tl.float64), mask=inside)
    sigma = sigma.to(tl.float64) * scale
    tl.store(value_ptr + start + place, sigma * sigma, mask=i < size)
