"""The matrix of rank k nearest to the weighted sum of all ΔW (Eckart and Young, 1936), as mixtures of units.

Shape suffixes as in pool.py; M columns of a block of vectors.
"""

from collections.abc import Callable
from functools import cache
from math import cos, pi

import torch
from torch import Tensor

from merging.assembly import Mixed
from merging.core import CoreSpace, basis
from merging.eigen import CUDA_LARGEST, eigh
from merging.pool import Pool

# Rounds of `leading`: plain ones find what is large, then the zeros of a Chebyshev polynomial on [0, 1] keep the rest small.
_PLAIN = 2
_SHIFTS = [(1 + cos((j + 0.5) * pi / 8)) / 2 for j in range(8)]

_MOST_WANTED = 3 * CUDA_LARGEST // 4  # vectors of a block, so that enough others keep it converging


def nearest(pool: Pool, k: int, spectrum: Callable[[Tensor], Tensor] = lambda sigma_LK: sigma_LK) -> Mixed:
    """Σ w c b aᵀ over all units, truncated to its k largest singular values; each side gets the root of them.

    Exact but for the Gram matrices' error, save on a GPU with over 128 units, see `leading`. There, k over 96 takes
    the whole eigenproblem and much longer.

    Args:
        spectrum: what to make of the k largest singular values, (L, K) in descending order.
    """
    gram_a_LNN, gram_b_LNN, noise = pool.fine_grams
    if gram_a_LNN.is_cuda and pool.units > CUDA_LARGEST and k <= _MOST_WANTED:
        left_LKN, sigma_LK, right_LKN = leading(gram_a_LNN, gram_b_LNN, pool.coefficient_LN, k, noise)
        half_LK1 = spectrum(sigma_LK)[:, :, None].sqrt()
        return Mixed(half_LK1 * right_LKN, half_LK1 * left_LKN)
    space = CoreSpace(pool)
    return space.truncated(space.core(), k, spectrum)


def leading(
    gram_a_LNN: Tensor, gram_b_LNN: Tensor, coefficient_LN: Tensor, k: int, noise: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular vectors of ΔW = Σ_n c_n b_n a_nᵀ by block iteration on the Gram matrices; float64.

    A block of 64 or 128 mixtures of units, U = Bᵀ X, is multiplied by ΔW ΔWᵀ − s again and again, in coordinates
    D G_A D G_B − s with D = diag(c), and made orthonormal. The first shifts s are 0; then they are the zeros of the
    Chebyshev polynomial on [0, e], e about the smallest eigenvalue that the block holds, which is under those wanted.
    At last the block is rotated to singular vectors (Rayleigh-Ritz).

    The part of the energy ‖ΔW_k‖² that is lost beside the optimum was below 1e-4 in all trials, the worst of which
    were random adapters, whose singular values hardly differ (N = 1024, k = 96); on spectra that decay it is rounding.
    Singular values down to 1e-5 of the largest are found.

    Args:
        coefficient_LN: c, float64; k: at most 96. noise: relative error of the Gram matrices.

    Returns:
        Mixtures of the b for left vectors (L, K, N), singular values (L, K) in descending order, mixtures of the a for
        right vectors (L, K, N).

    Source: subspace iteration with Chebyshev filters (Saad, Numerical Methods for Large Eigenvalue Problems, chapters 5 and 7).
    """
    block = CUDA_LARGEST // 2 if 4 * k <= CUDA_LARGEST else CUDA_LARGEST
    c_LN1 = coefficient_LN[:, :, None]
    square_LN1 = gram_b_LNN.diagonal(dim1=1, dim2=2)[:, :, None]

    def orthonormal(x_LNM: Tensor) -> tuple[Tensor, Tensor]:
        """The same space's X with Xᵀ G_B X = 1, and G_B X."""
        seen_LNM = gram_b_LNN @ x_LNM
        rotation_LMM = _whitening(x_LNM, seen_LNM).mT
        return x_LNM @ rotation_LMM, seen_LNM @ rotation_LMM

    length_LN1 = gram_a_LNN.diagonal(dim1=1, dim2=2)[:, :, None].sqrt()
    start_NM = _start(coefficient_LN.shape[1], block, coefficient_LN.device)
    y_LNM = torch.where(length_LN1 > 0, start_NM / length_LN1, 0.0)
    x_LNM, seen_LNM = orthonormal(c_LN1 * (gram_a_LNN @ y_LNM))
    for _ in range(_PLAIN):
        y_LNM = c_LN1 * seen_LNM
        back_LNM = gram_a_LNN @ y_LNM
        x_LNM, seen_LNM = orthonormal(c_LN1 * back_LNM @ _whitening(y_LNM, back_LNM).mT)
    y_LNM = c_LN1 * seen_LNM
    back_LNM = gram_a_LNN @ y_LNM
    most_L11 = _whitening(y_LNM, back_LNM).square().sum(dim=1, keepdim=True).amax(dim=2, keepdim=True)
    edge_L11 = torch.where(most_L11 > 0, 1 / most_L11, 0.0)
    for shift in _SHIFTS:
        x_LNM, seen_LNM = orthonormal(c_LN1 * back_LNM - shift * edge_L11 * x_LNM)
        y_LNM = c_LN1 * seen_LNM
        back_LNM = gram_a_LNN @ y_LNM
    known_L1M = noise * (x_LNM.square() * square_LN1).sum(dim=1, keepdim=True) < 1  # others cancel to less than the noise
    x_LNM, y_LNM, back_LNM = x_LNM * known_L1M, y_LNM * known_L1M, back_LNM * known_L1M
    value_LM, vector_LMM = eigh(y_LNM.mT @ back_LNM)
    sigma_LK, vector_LMK = value_LM[:, :k].clamp(min=0).sqrt(), vector_LMM[:, :, :k]
    inverse_LK = torch.where(sigma_LK > 0, 1 / sigma_LK, 0.0)
    return (x_LNM @ vector_LMK).mT, sigma_LK, inverse_LK[:, :, None] * (y_LNM @ vector_LMK).mT


def _whitening(x_LNM: Tensor, seen_LNM: Tensor) -> Tensor:
    """W with W (Xᵀ G X) Wᵀ = 1, given X and G X; (L, M, M)."""
    return basis(x_LNM.mT @ seen_LNM, torch.finfo(torch.float64).eps).inverse_LNN


@cache  # stays where it is: captured graphs read it
def _start(units: int, block: int, device: torch.device) -> Tensor:
    return torch.randn(units, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
