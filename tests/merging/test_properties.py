"""What holds for merging whatever the adapters are: order, splitting, absence and scale."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference.adapters import halves, merge_terms, permuted, random_adapter
from reference.drawn import methods, terms, weights
from reference.tolerance import assert_agree, assert_same_bytes, deltas

from merging import METHODS, LoraAdapter, LoraModule, MergeSpec, Term, merge

ELEMENTWISE = ["linear", "magnitude", "ties"]  # dare's masks go by an entry's place, so the order of units counts there
CORE = ["core-ties", "tsv", "iso"]

UNITWISE = [  # methods that see an adapter as a set of units: neither their order nor whose they are counts
    ("cat", {}),
    ("svd", {"rank": 3}),
    ("lego", {"rank": 3, "output": "none"}),
    ("lego", {"rank": 3, "output": "none", "norm": "2"}),
    ("lego", {"rank": 3, "output": "none", "canonical": True}),
    ("lego", {"rank": 3, "output": "none", "labels": "unit"}),
]


@given(method=methods, terms=terms(least=2, rank=4), random=st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_changes_no_byte(method, terms, random):
    shuffled = list(terms)
    random.shuffle(shuffled)
    assert_same_bytes(merge_terms(method, terms), merge_terms(method, shuffled))


@given(method=methods, terms=terms(least=2, rank=4))
def test_the_names_of_the_adapters_change_no_byte(method, terms):
    """Names decide the order of a spec's terms, which must not decide the order of the units."""
    adapters = {f"x{9 - i}": adapter for i, (adapter, _) in enumerate(terms)}
    spec = MergeSpec.create(method, [Term(f"x{9 - i}", weight) for i, (_, weight) in enumerate(terms)])
    assert_same_bytes(merge(adapters, spec, dtype=torch.float32), merge_terms(method, terms))


@pytest.mark.parametrize(("method", "options"), UNITWISE)
@given(terms=terms(least=2), seed=st.integers(0, 1000))
def test_the_order_of_the_units_does_not_matter(method, options, terms, seed):
    assume(sum(adapter.rank for adapter, _ in terms) >= 3)
    shuffled = [(permuted(adapter, seed + i), weight) for i, (adapter, weight) in enumerate(terms)]
    # Rounding differs with the order of a sum, so near-ties aside the results agree to float32.
    wanted = deltas(merge_terms(method, terms, options))
    assert_agree(merge_terms(method, shuffled, options), wanted, slack=20)


@pytest.mark.parametrize("method", ELEMENTWISE)
@given(terms=terms(least=2, rank=4), seed=st.integers(0, 1000))
def test_the_same_new_order_of_the_units_in_all_adapters_does_not_matter(method, terms, seed):
    shuffled = [(permuted(adapter, seed), weight) for adapter, weight in terms]
    assert_agree(merge_terms(method, shuffled), deltas(merge_terms(method, terms)), slack=20)


@pytest.mark.parametrize("method", CORE)
@given(terms=terms(least=2, most=3, rank=3), seed=st.integers(0, 1000))
def test_core_methods_see_each_adapter_as_a_matrix(method, terms, seed):
    """The order of an adapter's units does not count."""
    shuffled = [(permuted(adapter, seed + i), weight) for i, (adapter, weight) in enumerate(terms)]
    assert_agree(merge_terms(method, shuffled), deltas(merge_terms(method, terms)), slack=100)


@pytest.mark.parametrize(("method", "options"), UNITWISE)
@given(terms=terms(), rank=st.integers(2, 6), weight=weights)
def test_an_adapter_cut_in_two_halves_of_its_rank_merges_as_the_whole(method, options, terms, rank, weight):
    whole = random_adapter(77, rank)
    first, second = halves(whole)
    assume(rank + sum(adapter.rank for adapter, _ in terms) >= 3)
    together = merge_terms(method, [*terms, (whole, weight)], options)
    assert_agree(merge_terms(method, [*terms, (first, weight), (second, weight)], options), deltas(together), slack=20)


@given(method=methods, terms=terms(rank=4), zero=st.sampled_from([0, 0.0, -0.0, 4e-5, -4e-5]), rank=st.integers(1, 9))
def test_weight_zero_is_an_absent_adapter_of_whatever_rank(method, terms, zero, rank):
    assert_same_bytes(merge_terms(method, [*terms, (random_adapter(5, rank), zero)]), merge_terms(method, terms))


@pytest.mark.parametrize("factor", [4, 0.25])
@given(method=methods, terms=terms(least=2, rank=4))
def test_scaling_every_weight_scales_the_merge(method, factor, terms):
    """By 4 and 1/4, whose roots cost no bits, so that every decision of a method falls the same way."""
    terms = [(adapter, round(weight, 1) or 0.1) for adapter, weight in terms]
    scaled = merge_terms(method, [(adapter, weight * factor) for adapter, weight in terms])
    wanted = {name: factor * delta for name, delta in deltas(merge_terms(method, terms)).items()}
    assert_agree(scaled, wanted, slack=20)


@given(method=methods, terms=terms(least=2, rank=4))
def test_opposite_weights_give_the_opposite_merge(method, terms):
    assume(len({adapter.digest for adapter, _ in terms}) == len(terms))  # copies can cancel, and leave rounding errors only
    opposite = merge_terms(method, [(adapter, -weight) for adapter, weight in terms])
    wanted = {name: -delta for name, delta in deltas(merge_terms(method, terms)).items()}
    assert_agree(opposite, wanted, slack=20)


@given(method=methods, terms=terms(least=2, rank=4))
def test_a_weight_and_a_scaling_are_one_number(method, terms):
    """alpha doubled is the weight doubled: whatever is done with one must be done with the other."""
    louder = [(_rescaled(adapter, 2), weight) for adapter, weight in terms]
    doubled = merge_terms(method, [(adapter, 2 * weight) for adapter, weight in terms])
    assert_agree(merge_terms(method, louder), deltas(doubled), slack=20)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"iso"}))  # which evens out the spectrum of a single adapter too
@given(terms=terms(least=1, most=1), weight=weights)
def test_one_adapter_merges_to_itself_times_its_weight(method, terms, weight):
    adapter = terms[0][0]
    wanted = {name: weight * delta for name, delta in deltas(adapter).items()}
    whole = {"density": 1} if method in ("magnitude", "ties", "dare", "core-ties") else {}
    assert_agree(merge_terms(method, [(adapter, weight)], whole), wanted, slack=4)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lego", "iso", "tsv"}))
@given(terms=terms(least=1, most=1, rank=3), shares=st.lists(st.sampled_from([0.25, 0.5, 1, 2]), min_size=2, max_size=3))
def test_copies_of_one_adapter_are_its_sum_or_its_mean(method, terms, shares):
    """cat, svd and core-space add ΔW; the elementwise methods add or average factors whose weights are roots."""
    adapter = terms[0][0]
    roots = [share**0.5 for share in shares]
    gain = {"cat": sum(shares), "svd": sum(shares), "core-ties": sum(shares) / len(shares)}.get(method)
    if gain is None:
        gain = sum(roots) ** 2 / (len(roots) ** 2 if method == "ties" else 1)
    whole = {"density": 1} if method in ("magnitude", "ties", "dare", "core-ties") else {}
    wanted = {name: gain * delta for name, delta in deltas(adapter).items()}
    assert_agree(merge_terms(method, [(adapter, share) for share in shares], whole), wanted, slack=10)


@given(method=methods, terms=terms(rank=4))
def test_merging_leaves_the_adapters_as_they_were(method, terms):
    before = [(LoraAdapter(_copied(adapter)), weight) for adapter, weight in terms]
    merge_terms(method, terms)
    for (adapter, _), (copy, _) in zip(terms, before, strict=True):
        assert_same_bytes(adapter, copy)


def _rescaled(adapter: LoraAdapter, factor: float) -> LoraAdapter:
    return LoraAdapter({name: LoraModule(m.a, m.b, factor * m.scaling) for name, m in adapter.modules.items()})


def _copied(adapter: LoraAdapter) -> dict[str, LoraModule]:
    return {name: LoraModule(m.a.clone(), m.b.clone(), m.scaling) for name, m in adapter.modules.items()}
