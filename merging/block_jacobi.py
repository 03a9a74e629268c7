"""Eigenproblems too large for the GPU's kernels, from such as are not: two-sided block Jacobi.

All launches are batched, and their number depends on sizes alone, so that a CUDA graph can hold them.

Shape suffixes: P  problems   N  size of each   M  size with padding   C  two blocks, the size of a small problem
S  small problems.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Added to small problems, of which no eigenvalue is over 2: no vector is left out then, as the small solver does with those
# below 2.5e-13 of the largest, nor do rounding errors of float64 make one indefinite. Vectors stay the same.
_SHIFT = 1e-10
_PADDING = 2.0  # eigenvalue of what is padded, where no other is over 1: far from all, and so never mixed with any
_LOT = 1 << 26  # numbers of the problems that are solved at a time: half a GiB, of which some five are held


def block_eigh(x_PNN: Tensor, small: Callable[[Tensor], tuple[Tensor, Tensor]], largest: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (P, N), and eigenvectors as columns, (P, N, N), of positive semidefinite matrices; float64.

    In each round of a tournament, all pairs of blocks that it sets against each other are diagonalised side by side.
    Rotations are made orthogonal and applied in float64, so a small solver of float32 does: what it leaves in one sweep is
    small in the next.

    Args:
        small: solves the small problems, as this one does; positive definite, (S, C, C).
        largest: size of the small problems at most; even.

    Source: Golub and Van Loan, Matrix Computations (4th ed.), 8.5.4 to 8.5.6.
    """
    lot = max(1, _LOT // x_PNN.shape[1] ** 2)
    lots = [x_PNN[start : start + lot] for start in range(0, len(x_PNN), lot)]
    values, vectors = zip(*(_solve(some_PNN, small, largest) for some_PNN in lots), strict=True)
    return torch.cat(values), torch.cat(vectors)


def _solve(x_PNN: Tensor, small: Callable[[Tensor], tuple[Tensor, Tensor]], largest: int) -> tuple[Tensor, Tensor]:
    problems, size, _ = x_PNN.shape
    pairs = -(-size // largest)
    padded = 2 * pairs * -(-size // (2 * pairs))
    trace_P = x_PNN.diagonal(dim1=1, dim2=2).sum(dim=1)
    trace_P11 = torch.where(trace_P > 0, trace_P, 1.0)[:, None, None]
    g_PMM = x_PNN.new_zeros(problems, padded, padded)
    g_PMM[:, :size, :size] = x_PNN / trace_P11
    g_PMM.diagonal(dim1=1, dim2=2)[:, size:] = _PADDING
    row_PMM = torch.eye(padded, dtype=g_PMM.dtype, device=g_PMM.device).repeat(problems, 1, 1)
    first_M, *moves = _order(pairs, padded, g_PMM.device)
    g_PMM, row_PMM = g_PMM[:, first_M][:, :, first_M], row_PMM[:, first_M]
    # Fixed, as a graph cannot ask whether more are wanted; in trials on many spectra 4 did for two pairs and 6 for four.
    for _ in range(2 + 2 * pairs.bit_length()):
        for move_M in moves:
            turn_SCC = _rotations(g_PMM, pairs, small)
            g_PMM = _turned(turn_SCC, _turned(turn_SCC, g_PMM).mT)
            row_PMM = _turned(turn_SCC, row_PMM)
            g_PMM, row_PMM = g_PMM[:, move_M][:, :, move_M], row_PMM[:, move_M]
    value_PM, order_PM = g_PMM.diagonal(dim1=1, dim2=2).sort(dim=1, descending=True, stable=True)
    real_PN = order_PM[:, padded - size :]
    row_PNN = row_PMM.gather(1, real_PN[:, :, None].expand(-1, -1, padded))[:, :, :size]
    return value_PM[:, padded - size :].clamp(min=0) * trace_P11[:, 0], row_PNN.mT


def _rotations(g_PMM: Tensor, pairs: int, small: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Orthogonal (S, C, C) whose rows are eigenvectors of the blocks on the diagonal."""
    problems, padded, _ = g_PMM.shape
    wide = padded // pairs
    block_PSCC = g_PMM.view(problems, pairs, wide, pairs, wide).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    block_SCC = block_PSCC.reshape(-1, wide, wide)  # a copy
    block_SCC = (block_SCC + block_SCC.mT) / 2
    block_SCC.diagonal(dim1=1, dim2=2).add_(_SHIFT)
    row_SCC = small(block_SCC)[1].mT
    for _ in range(3):  # Newton-Schulz: from 1e-2, which the solver is under, by 1e-4 and 1e-8 to 1e-16
        row_SCC = 1.5 * row_SCC - 0.5 * (row_SCC @ row_SCC.mT) @ row_SCC
    return row_SCC


def _turned(turn_SCC: Tensor, x_PMM: Tensor) -> Tensor:
    """The rows of X, rotated pair of blocks by pair."""
    problems, padded, _ = x_PMM.shape
    return (turn_SCC @ x_PMM.reshape(-1, turn_SCC.shape[1], padded)).view(problems, padded, padded)


@cache  # stays where it is: captured graphs read it
def _order(pairs: int, padded: int, device: torch.device) -> list[Tensor]:
    """Where to take rows from: so that the first round's pairs lie side by side, then from each round to the next.

    The circle method: one player stays, the others move on. In each pair the lower player comes first and so gets the larger
    eigenvalues: these come to rest, as they must for each to meet every other.
    """
    players = 2 * pairs
    circles = [[0, *(1 + (k + turn) % (players - 1) for k in range(players - 1))] for turn in range(players - 1)]
    rounds = [[p for k in range(pairs) for p in sorted((circle[k], circle[-1 - k]))] for circle in circles]
    within = torch.arange(padded // players)
    moves = [[one.index(p) for p in after] for one, after in zip(rounds, [*rounds[1:], rounds[0]], strict=True)]
    return [(torch.tensor(x)[:, None] * len(within) + within).flatten().to(device) for x in (rounds[0], *moves)]
