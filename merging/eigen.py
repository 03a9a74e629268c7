"""Many small eigenproblems at once. Shape suffixes: P  problems   N  size of each."""

import torch
from torch import Tensor

CUDA_LARGEST = 128  # the GPU's kernels hold a matrix in registers


class NotCapturable(Exception):  # noqa: N818  (of the moment, not of the step)
    """A CUDA graph was to be captured of a step that speaks with the host: run it eagerly."""


def refuse_capture(x: Tensor, step: str) -> None:
    """Raise NotCapturable if a CUDA graph is being captured and `x` is on the GPU: the step would spoil it."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotCapturable(step)


def eigh(x_PNN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (P, N), and eigenvectors as columns, (P, N, N), of positive semidefinite matrices; float64.

    On a GPU and for N up to 128 in float32: square roots of eigenvalues are right to about 2e-5, vectors are orthonormal to
    about 1e-6 (1e-4 where eigenvalues coincide); where the root is below 5e-7 of the largest's, value and vector are 0.

    Raises:
        NotCapturable: for N over 128, while a CUDA graph is captured.
    """
    if x_PNN.is_cuda and x_PNN.shape[1] <= CUDA_LARGEST:
        from merging.cuda_eigen import eigenrows  # Triton is there with CUDA only

        value_PN, row_PNN = eigenrows(x_PNN)
        return value_PN, row_PNN.mT
    refuse_capture(x_PNN, f"cuSOLVER's eigenproblem of size {x_PNN.shape[1]}")
    value_PN, vector_PNN = torch.linalg.eigh(x_PNN)
    return value_PN.flip(1), vector_PNN.flip(2)


def svd(x_PNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values in descending order and Vᵀ of square matrices; float64.

    On a GPU and for N up to 128 from the eigenvectors V of Xᵀ X, with `eigh`'s errors; U Σ Vᵀ = X V Vᵀ is free of those of Σ.

    Raises:
        NotCapturable: as `eigh`.
    """
    if x_PNN.is_cuda and x_PNN.shape[1] <= CUDA_LARGEST:
        value_PN, v_PNN = eigh(x_PNN.mT @ x_PNN)
        sigma_PN = value_PN.sqrt()
        return x_PNN @ v_PNN * torch.where(sigma_PN > 0, 1 / sigma_PN, 0.0)[:, None, :], sigma_PN, v_PNN.mT
    refuse_capture(x_PNN, f"cuSOLVER's decomposition of size {x_PNN.shape[1]}")
    u_PNN, sigma_PN, v_PNN = torch.linalg.svd(x_PNN)
    return u_PNN, sigma_PN, v_PNN
