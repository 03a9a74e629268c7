"""How far a merge may be from its float64 reference, by the dtype that it writes: one table for all tests.

A factor rounded to a dtype with unit roundoff u moves by up to u relative to each entry, and ΔW = B A by about √2 u in
the Frobenius norm; the sums themselves run in float32. The table allows a few times that, far below what any wrong
factor (2, √k, a sign) would do.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from merging import LoraAdapter

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_agree(
    merged: LoraAdapter, wanted: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, *, slack: float = 1.0
) -> None:
    """Each module's dense ΔW is `wanted` but for the dtype's tolerance, times `slack` for ill-conditioned problems."""
    assert set(merged.modules) == set(wanted)
    for name, expected in wanted.items():
        module = merged.modules[name]
        assert module.a.dtype == module.b.dtype == dtype
        assert module.scaling == 1
        error = torch.linalg.norm(module.delta() - expected)
        bound = slack * TOLERANCE[dtype] * torch.linalg.norm(expected)
        assert error <= bound, f"{name}: off by {error:.3g}, {bound:.3g} is allowed"


def deltas(adapter: LoraAdapter) -> dict[str, Tensor]:
    """The dense ΔW of every module, float64."""
    return {name: module.delta() for name, module in adapter.modules.items()}


def assert_same_bytes(one: LoraAdapter, other: LoraAdapter) -> None:
    assert set(one.modules) == set(other.modules)
    for name, module in one.modules.items():
        for left, right in ((module.a, other.modules[name].a), (module.b, other.modules[name].b)):
            assert left.dtype == right.dtype
            assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)), name
