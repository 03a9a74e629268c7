"""The content key: same meaning, same key; another meaning, another key."""

import dataclasses
import re

from hypothesis import assume, given
from hypothesis import strategies as st
from reference.adapters import merge_terms, random_adapter
from reference.drawn import methods, names, weights
from reference.tolerance import assert_same_bytes

from merging import METHODS, MergeSpec, Term, merge

recipes = st.dictionaries(names, weights, min_size=1, max_size=6)


def digests(recipe):
    return {name: f"digest of {name}" for name in recipe}


def key(recipe, method="cat", options=None, dtype="bfloat16", digest_of=None):
    spec = MergeSpec.create(method, [Term(name, weight) for name, weight in recipe.items()], options)
    return spec.key(digest_of or digests(recipe), dtype)


@given(recipes, methods)
def test_the_key_is_a_sha256_and_always_the_same(recipe, method):
    assert re.fullmatch("[0-9a-f]{64}", key(recipe, method))
    assert key(recipe, method) == key(dict(recipe), method)


@given(recipes, methods, st.randoms(use_true_random=False))
def test_order_of_adapters_does_not_change_the_key(recipe, method, random):
    shuffled = dict(random.sample(list(recipe.items()), len(recipe)))
    assert key(recipe, method) == key(shuffled, method)


@given(recipes, methods)
def test_names_of_adapters_do_not_change_the_key(recipe, method):
    """Content does; the renamed adapters even sort the other way round."""
    renamed = {f"{1000 - i}": name for i, name in enumerate(sorted(recipe))}
    digest_of = {new: f"digest of {old}" for new, old in renamed.items()}
    assert key(recipe, method) == key({new: recipe[old] for new, old in renamed.items()}, method, digest_of=digest_of)


@given(recipes, methods)
def test_defaults_spelled_out_do_not_change_the_key(recipe, method):
    defaults = dataclasses.asdict(METHODS[method].options())
    for name, value in defaults.items():
        assert key(recipe, method, {name: value}) == key(recipe, method)
    assert key(recipe, method, defaults) == key(recipe, method)


@given(recipes, st.floats(-4e-5, 4e-5), methods)
def test_a_difference_below_the_rounding_does_not_change_the_key(recipe, nudge, method):
    assert key({name: weight + nudge for name, weight in recipe.items()}, method) == key(recipe, method)


@given(recipes, methods)
def test_a_weight_of_zero_does_not_change_the_key(recipe, method):
    assume(len(recipe) < 16)
    more = {**recipe, "absent": 0.0}
    assert key(more, method) == key(recipe, method)


@given(st.dictionaries(names, st.integers(-9, 9).filter(bool), min_size=1, max_size=6))
def test_whole_numbers_and_floats_are_one_weight(recipe):
    assert key(recipe) == key({name: float(weight) for name, weight in recipe.items()})


@given(recipes, st.data())
def test_another_weight_is_another_key(recipe, data):
    name = data.draw(st.sampled_from(sorted(recipe)))
    weight = data.draw(weights.filter(lambda w: w != recipe[name]))
    assert key({**recipe, name: weight}) != key(recipe)


@given(recipes, st.data())
def test_another_content_under_the_same_name_is_another_key(recipe, data):
    name = data.draw(st.sampled_from(sorted(recipe)))
    assert key(recipe, digest_of={**digests(recipe), name: "retrained"}) != key(recipe)


def test_weights_swapped_between_adapters_are_another_key():
    assert key({"a": 0.5, "b": 2.0}) != key({"a": 2.0, "b": 0.5})


def test_the_sign_of_a_weight_is_part_of_the_key():
    assert key({"a": 0.5}) != key({"a": -0.5})


@given(recipes)
def test_another_method_dtype_or_option_is_another_key(recipe):
    keys = [key(recipe, method) for method in METHODS]
    keys += [key(recipe, dtype=dtype) for dtype in ("float16", "float32")]
    for name, value in {"rank": 3, "norm": "2", "output": "none", "labels": "unit", "canonical": True, "restarts": 5,
                        "rounds": 21, "seed": 1}.items():  # fmt: skip
        keys.append(key(recipe, "lego", {name: value}))
    keys += [key(recipe, "lego", {"output": "sqrt-n/k"}), key(recipe, "lego", {"rank": 4}), key(recipe, "svd", {"rank": 3})]
    assert len(set(keys)) == len(keys)


def test_the_version_of_the_method_is_part_of_the_key():
    spec = MergeSpec.create("cat", [Term("a")])
    newer = dataclasses.replace(spec, method=dataclasses.replace(spec.method, version=spec.method.version + 1))
    assert newer.key({"a": "d"}, "bfloat16") != spec.key({"a": "d"}, "bfloat16")


def test_the_digest_of_an_adapter_outside_the_recipe_does_not_matter():
    assert key({"a": 1}, digest_of={"a": "d"}) == key({"a": 1}, digest_of={"a": "d", "b": "e"})


@given(methods, st.integers(0, 100))
def test_equal_keys_give_equal_bytes(method, seed):
    """Two names for one content, and other names: the key says they are one merge, so they must be."""
    one, other = random_adapter(seed, 3), random_adapter(seed + 1, 3)
    adapters = {"a": one, "b": other, "z": one}
    digest_of = {name: adapter.digest for name, adapter in adapters.items()}
    first = MergeSpec.create(method, [Term("a", 0.5), Term("b", -1)])
    second = MergeSpec.create(method, [Term("b", -1.00001), Term("z", 0.50001)])
    assert first.key(digest_of, "bfloat16") == second.key(digest_of, "bfloat16")
    assert_same_bytes(merge(adapters, first), merge(adapters, second))


def test_copies_with_swapped_weights_are_one_merge():
    one = random_adapter(1, 3)
    assert_same_bytes(merge_terms("lego", [(one, 0.5), (one, -2)]), merge_terms("lego", [(one, -2), (one, 0.5)]))
