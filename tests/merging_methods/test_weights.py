"""Weights by module: the first pattern decides, and equal meanings have equal keys."""

import pytest
import torch
from reference.adapters import random_adapter
from reference.tolerance import assert_same_bytes

from merging import MergeSpec, RecipeError, Term, check_rank, merge, ranks

ADAPTERS = {"a": random_adapter(1, 3), "b": random_adapter(2, 2)}
DIGESTS = {name: adapter.digest for name, adapter in ADAPTERS.items()}


def spec(weight, method="cat"):
    return MergeSpec.create(method, [Term.of("a", weight), Term("b", 0.5)])


def key(weight):
    return spec(weight).key(DIGESTS, "bfloat16")


@pytest.mark.parametrize("weight", [0.7, {"*.q_proj": 0.5, "*": 1.0}, {"*.q_proj": 0.5, "*layers.0*": 0.25, "*": -2.0}])
def test_plain_weights_come_back(weight):
    assert Term.of("a", weight).plain_weight == weight


def test_the_first_pattern_that_matches_decides():
    term = Term.of("a", {"*.layers.0.*q_proj": 2, "*.q_proj": 3, "*": 5})
    assert [term.at(f"model.layers.{i}.self_attn.{kind}") for i, kind in ((0, "q_proj"), (1, "q_proj"), (1, "k_proj"))] == [
        2,
        3,
        5,
    ]
    assert Term.of("a", {"*.q_proj": 3}).at("model.layers.0.mlp.up_proj") == 1


def test_each_module_is_weighted_by_its_pattern():
    merged = merge(
        {"a": ADAPTERS["a"]}, MergeSpec.create("cat", [Term.of("a", {"*.q_proj": 0.5, "*": -2})]), dtype=torch.float32
    )
    for name, module in merged.modules.items():
        weight = 0.5 if name.endswith("q_proj") else -2
        torch.testing.assert_close(module.delta(), weight * ADAPTERS["a"].modules[name].delta(), rtol=1e-5, atol=1e-6)


def test_weight_zero_at_a_module_is_an_adapter_absent_there():
    merged = merge(ADAPTERS, spec({"*.q_proj": 0, "*": 1}))
    assert {name: module.rank for name, module in merged.modules.items()} == {
        n: 2 if "q_proj" in n else 5 for n in merged.modules
    }
    assert check_rank(spec({"*.q_proj": 0, "*": 1}), {name: ranks(adapter) for name, adapter in ADAPTERS.items()}) == 5


def test_equal_meanings_have_equal_keys():
    assert key({"*": 0.7}) == key(0.7) == key({"*.q_proj": 0.7, "*": 0.70001})
    assert key({"*.q_proj": 0.5, "*": 1}) == key({"*.q_proj": 0.5}) != key(1.0)
    assert_same_bytes(merge(ADAPTERS, spec({"*.q_proj": 0.7, "*": 0.7})), merge(ADAPTERS, spec(0.7)))


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"'\*\.q_prj' matches no module of 'a'; did you mean '\*\.q_proj'"):
        merge(ADAPTERS, spec({"*.q_prj": 0.5, "*": 1}))


@pytest.mark.parametrize("weight", [float("nan"), {"*.q_proj": float("inf")}, {"*": float("nan")}])
def test_a_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(RecipeError, match="finite"):
        spec(weight)


def test_weights_of_zero_everywhere_are_refused():
    only = MergeSpec.create("cat", [Term.of("a", {"*_proj": 0, "*": 1})])
    with pytest.raises(RecipeError, match="every weight is 0"):
        merge(ADAPTERS, only)
