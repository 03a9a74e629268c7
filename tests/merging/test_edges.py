"""The edge grid: one adapter, rank 1, k = 1, k = N, k > N, copies, zeros, one huge unit; for every method and dtype."""

import pytest
import torch
from reference.adapters import merge_terms, of_units, random_adapter, zeroed
from reference.tolerance import TOLERANCE, assert_agree, deltas

from merging import METHODS, LoraAdapter, MergeSpec, RecipeError, Term, merge

RANKED = ["core-ties", "iso", "lego", "svd", "tsv"]  # methods that take a rank


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return request.param


def case(name: str) -> list[tuple[LoraAdapter, float]]:
    one, other = random_adapter(1, 4), random_adapter(2, 4)
    generator = torch.Generator().manual_seed(4)
    huge = of_units(1e3 * torch.randn(4, 12, generator=generator), torch.randn(14, 4, generator=generator))
    return {
        "one adapter": [(one, 1)],
        "one adapter, negative": [(one, -0.5)],
        "rank 1": [(random_adapter(1, 1), 1), (random_adapter(2, 1), -1)],
        "copies": [(one, 1), (one, 1), (one, 1)],
        "an adapter and its opposite": [(one, 1), (one, -1)],
        "one all zero": [(one, 1), (zeroed(other), 1)],
        "all zero": [(zeroed(one), 1), (zeroed(other), -1)],
        "factors all zero": [(one, 1), (LoraAdapter({n: type(m)(m.a * 0, m.b * 0) for n, m in other.modules.items()}), 1)],
        "one huge": [(one, 1), (huge, 1)],
        "sixteen": [(random_adapter(seed, 4), 0.1 * (seed - 7.5)) for seed in range(16)],
        "disjoint modules": [
            (LoraAdapter({n: m for n, m in one.modules.items() if "mlp" in n}), 1),
            (LoraAdapter({n: m for n, m in other.modules.items() if "attn" in n}), -1),
        ],
    }[name]


CASES = [
    "one adapter", "one adapter, negative", "rank 1", "copies", "an adapter and its opposite", "one all zero", "all zero",
    "factors all zero", "one huge", "sixteen", "disjoint modules",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_edges_give_finite_factors_of_the_asked_dtype(method, name, dtype):
    merged = merge_terms(method, case(name), dtype=dtype)
    assert set(merged.modules) == {module for adapter, _ in case(name) for module in adapter.modules}
    for module in merged.modules.values():
        assert module.a.dtype == module.b.dtype == dtype
        assert module.a.isfinite().all()
        assert module.b.isfinite().all()
        assert module.a.is_contiguous()
        assert module.b.is_contiguous()


@pytest.mark.parametrize("name", CASES)
def test_the_same_merge_gives_the_same_bytes(method, name):
    first, second = merge_terms(method, case(name)), merge_terms(method, case(name))
    assert {n: (m.a.tolist(), m.b.tolist()) for n, m in first.modules.items()} == {
        n: (m.a.tolist(), m.b.tolist()) for n, m in second.modules.items()
    }


@pytest.mark.parametrize("stored", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_merge_is_worked_out_in_float32_and_rounded_once(method, stored, dtype):
    terms = [(random_adapter(seed, 4, dtype=stored), weight) for seed, weight in ((1, 0.7), (2, -1.3))]
    precise = merge_terms(method, terms, dtype=torch.float32)
    for name, module in merge_terms(method, terms, dtype=dtype).modules.items():
        assert torch.equal(module.a, precise.modules[name].a.to(dtype))
        assert torch.equal(module.b, precise.modules[name].b.to(dtype))


def test_only_zeros_merge_to_zeros(method):
    for delta in deltas(merge_terms(method, case("all zero"))).values():
        assert not delta.any()


@pytest.mark.parametrize("options", [{}, {"norm": "2"}, {"labels": "unit"}, {"canonical": True}, {"norm": "2", "rank": 1}])
@pytest.mark.parametrize("name", CASES)
def test_edges_are_finite_with_every_option_of_lego(name, options):
    for delta in deltas(merge_terms("lego", case(name), options)).values():
        assert delta.isfinite().all()


@pytest.mark.parametrize("ranked", RANKED)
def test_rank_one_is_enough_to_ask(ranked):
    merged = merge_terms(ranked, case("sixteen"), {"rank": 1})
    assert {module.rank for module in merged.modules.values()} == {1}


@pytest.mark.parametrize("ranked", RANKED)
def test_all_the_units_may_be_asked_and_not_one_more(ranked):
    terms = [(random_adapter(1, 3), 1), (random_adapter(2, 2), 1)]
    assert merge_terms(ranked, terms, {"rank": 5}).rank == 5
    with pytest.raises(RecipeError, match=r"rank 6 is over 5.*use 5 or less") as caught:
        merge_terms(ranked, terms, {"rank": 6})
    assert caught.value.param == "rank"


@pytest.mark.parametrize("ranked", RANKED)
@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(ranked, rank):
    with pytest.raises(RecipeError, match=f"rank {rank} of {ranked}; use 1 or more") as caught:
        merge_terms(ranked, case("one adapter"), {"rank": rank})
    assert caught.value.param == "rank"


def test_cat_of_everything_keeps_the_huge_and_the_small():
    terms = case("one huge")
    merged = merge_terms("cat", terms)
    name = "model.layers.0.self_attn.q_proj"
    wanted = terms[0][0].modules[name].delta()
    units = merged.modules[name]
    small = units.a.norm(dim=1) < 100
    torch.testing.assert_close(units.b[:, small].double() @ units.a[small].double(), wanted, rtol=1e-5, atol=1e-6)


def test_adapters_of_different_base_models_are_refused():
    name = "model.layers.0.self_attn.q_proj"
    terms = [(random_adapter(1, 2, shapes={name: (14, 12)}), 1), (random_adapter(2, 2, shapes={name: (14, 16)}), 1)]
    with pytest.raises(RecipeError, match=rf"{name}.*\(14, 12\), \(14, 16\).*different base models") as caught:
        merge_terms("cat", terms)
    assert caught.value.param == "adapters"


def test_the_base_model_is_kept_where_all_agree_on_it():
    one = random_adapter(1, 2)
    stranger = LoraAdapter(random_adapter(2, 2).modules, base_model="other")
    assert merge_terms("cat", [(one, 1), (random_adapter(3, 2), 1)]).base_model == "tiny"
    assert merge_terms("cat", [(one, 1), (stranger, 1)]).base_model is None


def test_the_output_is_bfloat16_unless_asked_otherwise():
    merged = merge({"a": random_adapter(1, 2)}, MergeSpec.create("cat", [Term("a")]))
    assert_agree(merged, deltas(random_adapter(1, 2)), torch.bfloat16)
