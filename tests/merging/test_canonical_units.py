"""(a, b), (−a, −b) and (ca, b/c) are one unit: with canonical=True they merge alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.adapters import merge_terms, random_adapter
from reference.tolerance import assert_agree, deltas

from merging import LoraAdapter, LoraModule


def disguised(adapter: LoraAdapter, seed: int) -> LoraAdapter:
    """Every unit with its sign and scale changed at random (by powers of two, which cost no bits); the same ΔW."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in adapter.modules.items():
        sign = torch.randint(2, (module.rank,), generator=generator) * 2.0 - 1
        scale = sign * 2.0 ** torch.randint(-6, 7, (module.rank,), generator=generator)
        modules[name] = LoraModule(module.a * scale[:, None], module.b / scale, module.scaling)
    return LoraAdapter(modules)


@pytest.mark.parametrize("norm", ["inf", "2"])
@given(seed=st.integers(0, 1000), weight=st.sampled_from([1, -1, 0.4, -2.5]))
def test_disguised_units_merge_as_the_plain_ones(norm, seed, weight):
    one, other = random_adapter(seed, 4), random_adapter(seed + 1, 3)
    options = {"rank": 3, "norm": norm, "canonical": True}
    plain = merge_terms("lego", [(one, 1), (other, weight)], options)
    masked = merge_terms("lego", [(disguised(one, seed), 1), (disguised(other, seed + 1), weight)], options)
    assert_agree(masked, deltas(plain), slack=10)


def test_without_canonical_the_disguise_counts():
    one, other = random_adapter(1, 4), random_adapter(2, 3)
    plain = merge_terms("lego", [(one, 1), (other, 1)], {"rank": 3})
    masked = merge_terms("lego", [(disguised(one, 1), 1), (other, 1)], {"rank": 3})
    name = next(iter(plain.modules))
    assert torch.linalg.norm(plain.modules[name].delta() - masked.modules[name].delta()) > 0.01
