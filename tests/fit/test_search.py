"""The search: what it tries, that it judges what is merged, and that it finds the good adapter alone."""

import pytest
from reference.peft_model import with_deltas

from merging import LoraAdapter, LoraModule, MergeSpec, RecipeError, Term, merge
from merging.fit import FitError, held_out_loss, search


@pytest.fixture(scope="module")
def rows(toy):
    return toy.rows.split(0.1, seed=0)[1]


def test_the_harmful_adapter_is_weakened_and_the_loss_falls(toy, rows):
    found = search(toy.model, toy.adapters, "cat", rows)
    weights = {term.adapter: term.weight for term in found.best.spec.terms}
    assert weights["bad"] == 0.25  # one half of all, then one half of its own
    assert weights["good"] >= 0.5
    assert found.best.loss < found.tries[0].loss
    assert found.tries[0].spec == MergeSpec.create("cat", [Term("good"), Term("bad")])


def test_lego_is_searched_over_rank_norm_and_weights(toy, rows):
    told = []
    found = search(toy.model, toy.adapters, "lego", rows, progress=lambda *now: told.append(now))
    tried = [tried.spec for tried in found.tries]
    assert [spec.options.rank for spec in tried[:4]] == [None, 2, 5, 7]  # ranks 4 and 3
    assert {spec.options.norm for spec in tried} == {"inf", "2"}
    assert [done for done, _, _ in told] == list(range(1, len(tried) + 1))
    assert len(tried) <= told[0][1]
    assert len(set(tried)) == len(tried)


def test_each_loss_is_that_of_the_merged_adapter_on_dense_weights(toy, rows):
    for tried in search(toy.model, toy.adapters, "svd", rows).tries[::4]:
        merged = merge(toy.adapters, tried.spec, dtype=toy.model.dtype)
        dense = with_deltas(toy.model, {name: part.delta() for name, part in merged.modules.items()})
        assert tried.loss == pytest.approx(held_out_loss(dense, toy.adapters, [Term("good", 0)], rows), abs=1e-4)


def test_densities_are_tried_where_the_method_has_one(toy, rows):
    alike = dict.fromkeys(("one", "two"), toy.adapters["good"])
    found = search(toy.model, alike, "magnitude", rows)
    assert {tried.spec.options.density for tried in found.tries} >= {0.2, 0.4, 0.6, 0.8}


def test_a_method_that_cannot_merge_the_adapters_says_why(toy, rows):
    with pytest.raises(RecipeError, match="equal rank"):
        search(toy.model, toy.adapters, "ties", rows)


def test_defaults_without_a_finite_loss_are_refused(toy, rows):
    huge = {name: LoraModule(part.a * 1e30, part.b * 1e30) for name, part in toy.adapters["bad"].modules.items()}
    with pytest.raises(FitError, match="cat with its defaults has no finite loss"):
        search(toy.model, {"huge": LoraAdapter(huge)}, "cat", rows)
