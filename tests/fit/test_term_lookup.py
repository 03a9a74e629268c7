"""Weights of single modules are looked up, and mean what matching every pattern in turn means."""

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import RecipeError, Term

MODULES = [f"model.layers.{layer}.{kind}" for layer in (0, 1, 10) for kind in ("q_proj", "k_proj")]
PATTERNS = st.sampled_from(
    [*MODULES, "*", "*.q_proj", "model.layers.1.*", "model.layers.?.*", "model.layers.[01]*.k_proj", "none"]
)
PAIRS = st.lists(st.tuples(PATTERNS, st.integers(-9, 9).map(float)), max_size=10).map(tuple)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(PAIRS)
def test_the_first_pattern_that_matches_decides_as_in_the_naive_rule(pairs):
    term = Term("a", 0.5, pairs)
    for module in [*MODULES, "lm_head", *MODULES]:
        assert term.at(module) == next((weight for pattern, weight in pairs if fnmatchcase(module, pattern)), 0.5)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(PAIRS, st.sets(st.sampled_from(MODULES), min_size=1))
def test_a_pattern_that_matches_no_module_is_refused_as_in_the_naive_rule(pairs, modules):
    useless = [pattern for pattern, _ in pairs if not any(fnmatchcase(module, pattern) for module in modules)]
    if useless:
        with pytest.raises(RecipeError, match=re.escape(repr(useless[0]))):
            Term("a", 0.5, pairs).check(modules)
    else:
        Term("a", 0.5, pairs).check(modules)


def test_what_was_looked_up_does_not_count_in_comparisons():
    one, other = (Term("a", 1.0, (("*.q_proj", 2.0),)) for _ in range(2))
    one.at(MODULES[0])
    assert one == other
    assert hash(one) == hash(other)
