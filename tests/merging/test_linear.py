"""linear sums the factors, cross terms included, as PEFT does (parity with PEFT itself: test_peft_parity.py)."""

import pytest
from hypothesis import given
from reference.adapters import at_module, merge_terms, modules_of, random_adapter
from reference.drawn import terms
from reference.linear import linear
from reference.tolerance import TOLERANCE, assert_agree

from merging import RecipeError


@given(terms=terms(rank=3))
def test_linear_sums_the_factors(terms):
    # Sums of factors cancel by chance where weights have both signs, which costs a digit of the result.
    wanted = {name: linear(at_module(terms, name)) for name in modules_of(terms)}
    assert_agree(merge_terms("linear", terms), wanted, slack=10)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_sums_the_factors_in_every_dtype(dtype):
    terms = [(random_adapter(seed, 4, alpha=2 * seed, dtype=dtype), w) for seed, w in ((1, 0.7), (2, -0.4), (3, 1.2))]
    wanted = {name: linear(at_module(terms, name)) for name in modules_of(terms)}
    assert_agree(merge_terms("linear", terms, dtype=dtype), wanted, dtype)


def test_ranks_may_differ_between_modules_but_not_within_one():
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 3,
             "model.layers.0.mlp.up_proj": 1, "model.layers.0.mlp.down_proj": 5}  # fmt: skip
    terms = [(random_adapter(1, ranks), 0.5), (random_adapter(2, ranks), -0.8)]
    merged = merge_terms("linear", terms)
    assert {name: module.rank for name, module in merged.modules.items()} == ranks
    assert_agree(merged, {name: linear(at_module(terms, name)) for name in ranks})


def test_a_module_that_one_adapter_misses_is_the_others_alone():
    up = "model.layers.0.mlp.up_proj"
    terms = [(random_adapter(1, 4), 0.5), (random_adapter(2, 4, without=[up]), 2)]
    assert_agree(merge_terms("linear", terms), {name: linear(at_module(terms, name)) for name in modules_of(terms)})


def test_different_ranks_are_refused_with_the_methods_that_take_them():
    with pytest.raises(RecipeError, match=r"equal rank.*\[2, 4\].*cat") as caught:
        merge_terms("linear", [(random_adapter(1, 4), 1), (random_adapter(2, 2), 1)])
    assert caught.value.param == "method"
