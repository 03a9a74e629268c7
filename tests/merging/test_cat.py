"""cat is the exact weighted sum, at the sum of the ranks."""

import pytest
import torch
from hypothesis import given
from reference.adapters import at_module, merge_terms, modules_of, motley, random_adapter
from reference.cat import cat
from reference.drawn import terms
from reference.tolerance import TOLERANCE, assert_agree


@given(terms=terms())
def test_cat_is_the_weighted_sum(terms):
    assert_agree(merge_terms("cat", terms), {name: cat(at_module(terms, name)) for name in modules_of(terms)})


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cat_is_the_weighted_sum_in_every_dtype(dtype):
    terms = motley(dtype)
    wanted = {name: cat(at_module(terms, name)) for name in modules_of(terms)}
    assert_agree(merge_terms("cat", terms, dtype=dtype), wanted, dtype)


@pytest.mark.parametrize("stored", TOLERANCE)
def test_weights_are_applied_in_float32_whatever_the_factors_are_stored_in(stored):
    terms = motley(stored)
    assert_agree(merge_terms("cat", terms), {name: cat(at_module(terms, name)) for name in modules_of(terms)}, torch.float32)


def test_cat_of_adapters_of_different_dtypes_loses_nothing_of_any():
    terms = [
        (random_adapter(1, 3, dtype=torch.bfloat16), 0.5),
        (random_adapter(2, 4, dtype=torch.float32), -2),
        (random_adapter(3, 2, dtype=torch.float16), 1.5),
    ]
    assert_agree(merge_terms("cat", terms), {name: cat(at_module(terms, name)) for name in modules_of(terms)})


def test_rank_is_the_sum_of_the_ranks_of_the_adapters_present():
    merged = merge_terms("cat", motley())
    assert {name: module.rank for name, module in merged.modules.items()} == {
        "model.layers.0.self_attn.q_proj": 4 + 3 + 2,
        "model.layers.1.self_attn.q_proj": 4 + 3 + 2,
        "model.layers.0.mlp.up_proj": 4 + 1,
        "model.layers.0.mlp.down_proj": 4 + 5 + 2,
    }


def test_a_module_that_one_adapter_misses_is_the_others_alone():
    up = "model.layers.0.mlp.up_proj"
    whole, partial = random_adapter(1, 4), random_adapter(2, 3, without=[up])
    merged = merge_terms("cat", [(whole, 0.5), (partial, 2)])
    torch.testing.assert_close(merged.modules[up].delta(), 0.5 * whole.modules[up].delta())
