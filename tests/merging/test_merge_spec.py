"""MergeSpec: what is refused, and what is filled in."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.drawn import names, weights

from merging import METHODS, MergeSpec, RecipeError, Term

A, B = Term("a"), Term("b")

REFUSED = {
    "unknown method": (("legoo", [A]), "method", r"unknown method 'legoo'.*did you mean 'lego'"),
    "no adapters": (("cat", []), "adapters", r"0 adapters.*use 1 to 16"),
    "too many adapters": (("cat", [Term(f"a{i}") for i in range(17)]), "adapters", r"17 adapters.*use 1 to 16"),
    "a name twice": (("cat", [A, B, Term("a", 0.5)]), "adapters", r"'a' stands twice"),
    "a name twice, once with weight 0": (("cat", [A, Term("a", 0)]), "adapters", r"'a' stands twice"),
    "NaN": (("cat", [A, Term("b", math.nan)]), "weight", r"nan of 'b'"),
    "infinite": (("cat", [Term("b", -math.inf)]), "weight", r"-inf of 'b'"),
    "every weight 0": (("cat", [Term("a", 0), Term("b", 0.0)]), "weight", r"every weight is 0.*base model"),
    "every weight rounds to 0": (("cat", [Term("a", 4e-5)]), "weight", r"after rounding"),
    "unknown option": (("lego", [A], {"rnak": 3}), "options", r"lego has no option 'rnak'.*'rank'"),
    "option of a method that has none": (("cat", [A], {"rank": 3}), "options", r"cat has no option 'rank'.*takes none"),
    "a fraction for a whole number": (("lego", [A], {"rank": 3.5}), "rank", r"rank=3.5.*whole number"),
    "a word for a number": (("svd", [A], {"rank": "3"}), "rank", r"rank='3'.*whole number"),
    "true for a number": (("svd", [A], {"rank": True}), "rank", r"rank=True.*whole number"),
    "a number for true": (("lego", [A], {"canonical": 1}), "canonical", r"canonical=1.*true or false"),
    "none of the choices": (("lego", [A], {"norm": "1"}), "norm", r"norm='1'.*'inf', '2'"),
    "a number for a choice": (("lego", [A], {"norm": 2}), "norm", r"norm=2 .*'inf', '2'"),
    "a list for a choice": (("lego", [A], {"norm": ["inf"]}), "norm", r"one of 'inf', '2'"),
    "null for a number": (("lego", [A], {"restarts": None}), "restarts", r"restarts=None.*whole number"),
    "no restarts": (("lego", [A], {"restarts": 0}), "restarts", r"restarts=0.*1 to 64"),
    "too many restarts": (("lego", [A], {"restarts": 65}), "restarts", r"restarts=65.*1 to 64"),
    "no rounds": (("lego", [A], {"rounds": 0}), "rounds", r"rounds=0.*1 to 300"),
    "too many rounds": (("lego", [A], {"rounds": 301}), "rounds", r"rounds=301.*1 to 300"),
    "a negative seed": (("lego", [A], {"seed": -1}), "seed", r"seed=-1"),
    "a seed beyond torch's": (("lego", [A], {"seed": 2**63}), "seed", r"seed=9223372036854775808"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_cannot_be_is_refused_with_its_fault_and_a_remedy(case):
    arguments, param, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message) as caught:
        MergeSpec.create(*arguments)
    assert caught.value.param == param


@pytest.mark.parametrize("options", [{"restarts": 64}, {"rounds": 300}, {"seed": 2**63 - 1}, {"rank": 1}, {"rank": None}])
def test_the_last_allowed_value_is_allowed(options):
    assert MergeSpec.create("lego", [A], options)


def test_sixteen_adapters_are_not_too_many():
    assert len(MergeSpec.create("cat", [Term(f"a{i}") for i in range(16)]).terms) == 16


def test_terms_are_sorted_rounded_and_counted():
    spec = MergeSpec.create("cat", [Term("b", 0.12344), Term("c", 0.00004), Term("a", -1)])
    assert spec.terms == (Term("a", -1.0), Term("b", 0.1234))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_defaults_are_filled_in(name):
    assert MergeSpec.create(name, [A]).options == METHODS[name].options()


@given(st.dictionaries(names, weights, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_the_terms_does_not_change_the_spec(recipe, random):
    terms = [Term(name, weight) for name, weight in recipe.items()]
    shuffled = random.sample(terms, len(terms))
    assert MergeSpec.create("cat", terms) == MergeSpec.create("cat", shuffled)
    assert hash(MergeSpec.create("cat", terms)) == hash(MergeSpec.create("cat", shuffled))


def test_the_callers_options_stay_as_they_were():
    options = {"rank": 4}
    MergeSpec.create("lego", [A], options)
    assert options == {"rank": 4}
