"""Many small eigenproblems at once. Shape suffixes: P  problems   N  size of each."""

import torch
from torch import Tensor

from merging.block_jacobi import block_eigh

CUDA_LARGEST = 128  # the GPU's kernels hold a matrix in registers
_CUDA_FLOOR = 2.5e-13  # eigenvalues below this part of the largest are rounding errors of the kernels


def eigh(x_PNN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (P, N), and eigenvectors as columns, (P, N, N), of positive semidefinite matrices; float64.

    On a GPU square roots of eigenvalues are right to about 2e-5 of the largest; what is below 5e-7 of it is 0. For N up to 128
    in float32: vectors are orthonormal to about 1e-6 (1e-4 where eigenvalues coincide), and 0 where the value is. Beyond by
    `block_eigh`: vectors are orthonormal to 1e-10, all of them.
    """
    if x_PNN.is_cuda:
        if x_PNN.shape[1] > CUDA_LARGEST:
            value_PN, vector_PNN = block_eigh(x_PNN, eigh, CUDA_LARGEST)
            return torch.where(value_PN > _CUDA_FLOOR * value_PN[:, :1], value_PN, 0.0), vector_PNN
        from merging.cuda_eigen import eigenrows  # Triton is there with CUDA only

        value_PN, row_PNN = eigenrows(x_PNN)
        return value_PN, row_PNN.mT
    value_PN, vector_PNN = torch.linalg.eigh(x_PNN)
    return value_PN.flip(1), vector_PNN.flip(2)


def svd(x_PNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values in descending order and Vᵀ of square matrices; float64.

    On a GPU from the eigenvectors V of Xᵀ X, with `eigh`'s errors; U Σ Vᵀ = X V Vᵀ is free of those of Σ.
    """
    if x_PNN.is_cuda:
        value_PN, v_PNN = eigh(x_PNN.mT @ x_PNN)
        sigma_PN = value_PN.sqrt()
        return x_PNN @ v_PNN * torch.where(sigma_PN > 0, 1 / sigma_PN, 0.0)[:, None, :], sigma_PN, v_PNN.mT
    u_PNN, sigma_PN, v_PNN = torch.linalg.svd(x_PNN)
    return u_PNN, sigma_PN, v_PNN
