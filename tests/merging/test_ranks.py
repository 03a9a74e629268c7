"""check_rank says, without merging, what rank a merge will have; it fails where the merge would."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.adapters import SHAPES, merge_terms, random_adapter

from merging import METHODS, MergeSpec, RecipeError, Term, check_rank, ranks

UP = "model.layers.0.mlp.up_proj"


@st.composite
def mixed(draw):
    """An adapter with a rank for each module, of which some may be missing."""
    without = draw(st.sets(st.sampled_from(sorted(SHAPES)), max_size=3))
    return random_adapter(draw(st.integers(0, 99)), {name: draw(st.integers(1, 4)) for name in SHAPES}, without=without)


@given(method=st.sampled_from(sorted(METHODS)), adapters=st.lists(mixed(), min_size=1, max_size=3), rank=st.integers(0, 8))
def test_the_rank_foretold_is_the_rank_of_the_merge_and_refusals_agree(method, adapters, rank):
    options = {"rank": rank} if rank and METHODS[method].number == "rank" else {}
    spec = MergeSpec.create(method, [Term(f"a{i}") for i in range(len(adapters))], options)
    terms = [(adapter, 1.0) for adapter in adapters]
    try:
        foretold = check_rank(spec, {f"a{i}": ranks(adapter) for i, adapter in enumerate(adapters)})
    except RecipeError as error:
        with pytest.raises(RecipeError, match=re.escape(str(error))):
            merge_terms(method, terms, options)
    else:
        assert merge_terms(method, terms, options).rank == foretold


def test_ranks_are_those_of_each_module():
    wanted = dict(zip(SHAPES, (3, 1, 2, 5), strict=True))
    assert ranks(random_adapter(1, wanted)) == wanted
    assert random_adapter(1, wanted).rank == 5


def test_cat_sums_the_ranks_of_the_module_that_has_most():
    spec = MergeSpec.create("cat", [Term("a"), Term("b")])
    assert check_rank(spec, {"a": {"x": 4, "y": 1}, "b": {"x": 2, "z": 5}}) == 6


def test_lego_may_ask_what_only_one_module_has():
    spec = MergeSpec.create("lego", [Term("a"), Term("b")], {"rank": 6})
    assert check_rank(spec, {"a": {"x": 4, "y": 1}, "b": {"x": 2, "z": 5}}) == 6
    with pytest.raises(RecipeError, match="rank 6 is over 5"):
        check_rank(spec, {"a": {"x": 3, "y": 1}, "b": {"x": 2, "z": 5}})


def test_only_the_adapters_of_the_recipe_count():
    spec = MergeSpec.create("linear", [Term("a"), Term("b", 0)])
    assert check_rank(spec, {"a": {"x": 4}, "b": {"x": 2}}) == 4
