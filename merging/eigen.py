"""Many small eigenproblems at once. Shape suffixes: P  problems   N  size of each."""

import torch
from torch import Tensor

_CUDA_LARGEST = 128  # the GPU's kernel holds a matrix in registers


def eigh(x_PNN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (P, N), and eigenvectors as columns, (P, N, N), of positive semidefinite matrices; float64.

    On a GPU, vectors of eigenvalues that are rounding errors beside the largest may be anything.
    """
    if x_PNN.is_cuda and x_PNN.shape[1] <= _CUDA_LARGEST:
        value_PN, vector_PNN = _right(x_PNN)
        return value_PN, vector_PNN.mT
    value_PN, vector_PNN = torch.linalg.eigh(x_PNN)
    return value_PN.flip(1), vector_PNN.flip(2)


def svd(x_PNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values in descending order and Vᵀ of square matrices; float64.

    On a GPU, vectors of singular values that are rounding errors beside the largest may be anything.
    """
    if x_PNN.is_cuda and x_PNN.shape[1] <= _CUDA_LARGEST:
        sigma_PN, v_PNN = _right(x_PNN)
        return x_PNN @ v_PNN.mT * torch.where(sigma_PN > 0, 1 / sigma_PN, 0.0)[:, None, :], sigma_PN, v_PNN
    u_PNN, sigma_PN, v_PNN = torch.linalg.svd(x_PNN)
    return u_PNN, sigma_PN, v_PNN


def _right(x_PNN: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and Vᵀ, on the GPU."""
    from merging.cuda_eigen import orthogonal_rows  # Triton is there with CUDA only

    scale_P11 = x_PNN.abs().amax(dim=(1, 2), keepdim=True)
    row_PNN = orthogonal_rows((x_PNN / torch.where(scale_P11 > 0, scale_P11, 1.0)).float()).double()
    sigma_PN, order_PN = torch.linalg.vector_norm(row_PNN, dim=2).sort(dim=1, descending=True)
    row_PNN = row_PNN.gather(1, order_PN[:, :, None].expand_as(row_PNN))
    return sigma_PN * scale_P11[:, :, 0], row_PNN * torch.where(sigma_PN > 0, 1 / sigma_PN, 0.0)[:, :, None]
