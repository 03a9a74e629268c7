"""Large eigenproblems from small ones, on the CPU with a stand-in for the GPU's solver, against LAPACK's."""

import pytest
import torch
from torch.linalg import norm

from merging.block_jacobi import block_eigh


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rough_eigh(x):
    """As merging/cuda_eigen.py: float32 vectors of a float64 root, and nothing below 5e-7 of the largest."""
    root = torch.linalg.cholesky(x)
    scale = root.abs().amax(dim=(1, 2), keepdim=True)
    vector, sigma, _ = (y.double() for y in torch.linalg.svd((root / scale).float()))
    kept = sigma > 5e-7 * sigma[:, :1]
    return (kept * sigma * scale[:, 0]).square(), kept[:, None] * vector


def with_spectrum(value):
    q = torch.linalg.qr(normal(len(value), len(value))).Q
    return (q * value) @ q.mT


def gram(x):
    return x @ x.mT


CASES = {
    "gram": lambda n: gram(normal(n, 4 * n)),
    "square": lambda n: gram(normal(n, n)),
    "identity": lambda n: torch.eye(n, dtype=torch.float64),
    "clusters": lambda n: with_spectrum(1.0 + torch.arange(n, dtype=torch.float64) // 16),
    "duplicates": lambda n: gram(normal((n + 1) // 2, n).repeat(2, 1)[:n]),
    "deficient": lambda n: gram(normal(n, n // 3)),
    "rank 1": lambda n: gram(normal(n, 1)),
    "huge range": lambda n: with_spectrum(torch.logspace(0, -8, n, dtype=torch.float64)),
    "badly scaled": lambda n: gram(normal(n, n) * torch.logspace(-4, 4, n, dtype=torch.float64)[normal(n).argsort()][:, None]),
    "blocks": lambda n: torch.block_diag(gram(normal(n // 2, n)), torch.zeros(n - n // 2, n - n // 2, dtype=torch.float64)),
    "tiny": lambda n: 1e-200 * gram(normal(n, n)),
    "zeros": lambda n: torch.zeros(n, n, dtype=torch.float64),
}


@pytest.mark.parametrize("size", [129, 200, 256, 512])
def test_values_and_vectors_are_lapacks(size):
    x = torch.stack([case(size) for case in CASES.values()])
    largest = torch.linalg.matrix_norm(x, 2)
    value, vector = block_eigh(x, rough_eigh, 128)
    wanted = torch.linalg.eigvalsh(x).flip(1).clamp(min=0)
    assert (value.diff(dim=1) <= 0).all()
    assert ((value.sqrt() - wanted.sqrt()).abs() <= 1e-5 * largest.sqrt()[:, None]).all()
    assert (vector.mT @ vector - torch.eye(size)).abs().max() < 1e-10
    assert (norm((vector * value[:, None]) @ vector.mT - x, dim=(1, 2)) <= 1e-5 * norm(x, dim=(1, 2))).all()


def test_lots_and_blocks_of_any_size():
    x = normal(5, 45, 60) @ normal(5, 45, 60).mT
    wanted = torch.linalg.eigvalsh(x).flip(1)
    for largest in (8, 20, 32):
        value, vector = block_eigh(x, rough_eigh, largest)
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=0)
        assert norm(x @ vector - vector * value[:, None]) < 1e-4 * norm(x)
