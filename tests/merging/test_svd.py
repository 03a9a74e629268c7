"""svd is the best approximation of the weighted sum at its rank; held by optimality, as singular vectors are not unique."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.adapters import at_module, halves, merge_terms, modules_of, motley, of_units, random_adapter, zeroed
from reference.cat import cat
from reference.drawn import terms
from reference.svd import svd
from reference.tolerance import TOLERANCE, assert_agree

from merging.nearest import leading


@given(terms=terms(least=2), k=st.integers(1, 6))
def test_no_matrix_of_rank_k_is_nearer_to_the_sum(terms, k):
    k = min(k, min(sum(module.rank for module, _ in at_module(terms, name)) for name in modules_of(terms)))
    merged = merge_terms("svd", terms, {"rank": k})
    for name, module in merged.modules.items():
        total = cat(at_module(terms, name))
        best = torch.linalg.norm(total - svd(at_module(terms, name), k))
        assert module.rank == k
        assert torch.linalg.norm(total - module.delta()) <= best + 1e-5 * torch.linalg.norm(total)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_svd_is_the_truncated_sum_in_every_dtype(dtype):
    terms = motley(dtype)
    wanted = {name: svd(at_module(terms, name), 3) for name in modules_of(terms)}
    assert_agree(merge_terms("svd", terms, {"rank": 3}, dtype=dtype), wanted, dtype, slack=2)


def test_rank_of_all_units_gives_the_sum_itself():
    terms = [(random_adapter(1, 3), 0.7), (random_adapter(2, 5), -0.9)]
    assert_agree(merge_terms("svd", terms, {"rank": 8}), {n: cat(at_module(terms, n)) for n in modules_of(terms)})


def test_singular_values_are_shared_evenly_by_the_factors():
    """√σ on each side, so that neither factor leaves the range of a small dtype."""
    merged = merge_terms("svd", motley(), {"rank": 3})
    for name, module in merged.modules.items():
        sigma = torch.linalg.svdvals(cat(at_module(motley(), name)))[:3]
        torch.testing.assert_close(module.a.double() @ module.a.double().T, torch.diag(sigma), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.b.double().T @ module.b.double(), torch.diag(sigma), rtol=1e-4, atol=1e-4)


def test_rank_defaults_to_the_largest_rank_of_any_adapter():
    ranks = {name: module.rank for name, module in merge_terms("svd", motley()).modules.items()}
    assert ranks == {name: max(module.rank for module, _ in at_module(motley(), name)) for name in ranks}


def test_copies_of_one_adapter_need_no_more_rank_than_one():
    adapter = random_adapter(1, 4)
    merged = merge_terms("svd", [(adapter, 0.5), (adapter, 0.25), (adapter, -2)], {"rank": 4})
    assert_agree(merged, {name: -1.25 * module.delta() for name, module in adapter.modules.items()}, slack=3)


def test_rank_beyond_what_the_sum_has_pads_with_zeros():
    adapter = random_adapter(1, 2)
    merged = merge_terms("svd", [(adapter, 1), (adapter, 1)], {"rank": 4})
    assert_agree(merged, {name: 2 * module.delta() for name, module in adapter.modules.items()}, slack=3)


def test_an_adapter_less_itself_is_nothing():
    adapter = random_adapter(1, 4)
    merged = merge_terms("svd", [(adapter, 1), (adapter, -1)])
    for name, module in merged.modules.items():
        assert torch.linalg.norm(module.delta()) <= 1e-5 * torch.linalg.norm(adapter.modules[name].delta())


def test_what_training_changed_between_two_checkpoints_is_kept():
    """A small difference of two near-equal adapters: exact with cat, so svd at the full rank must have it too."""
    before = random_adapter(1, 4, alpha=4)
    generator = torch.Generator().manual_seed(7)
    a, b = before.modules["model.layers.0.self_attn.q_proj"].a, before.modules["model.layers.0.self_attn.q_proj"].b
    after = of_units(a + 1e-3 * torch.randn(a.shape, generator=generator), b + 1e-3 * torch.randn(b.shape, generator=generator))
    terms = [(of_units(a, b), -1), (after, 1)]
    wanted = {name: cat(at_module(terms, name)) for name in modules_of(terms)}
    assert_agree(merge_terms("svd", terms, {"rank": 8}), wanted, slack=1000)  # 0.3 %


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_units_of_very_different_size_do_not_hide_each_other(size):
    """One huge unit; what is asked for is the rest, as the rest alone would give it."""
    rest = random_adapter(1, 3, shapes={"model.layers.0.self_attn.q_proj": (14, 12)})
    generator = torch.Generator().manual_seed(3)
    huge = of_units(size * torch.randn(1, 12, generator=generator), torch.randn(14, 1, generator=generator))
    terms = [(rest, 1), (huge, 1)]
    merged = merge_terms("svd", terms, {"rank": 4})
    for name in modules_of(terms):
        left = merged.modules[name].delta() - huge.modules[name].delta()
        bound = 1e-6 * torch.linalg.norm(huge.modules[name].delta()) + 1e-5 * torch.linalg.norm(rest.modules[name].delta())
        assert torch.linalg.norm(left - rest.modules[name].delta()) <= bound


def test_an_untrained_adapter_adds_nothing():
    trained = random_adapter(1, 4)
    merged = merge_terms("svd", [(trained, 0.5), (zeroed(random_adapter(2, 3)), 3)], {"rank": 4})
    assert_agree(merged, {name: 0.5 * module.delta() for name, module in trained.modules.items()}, slack=3)


def test_only_zeros_merge_to_zeros():
    merged = merge_terms("svd", [(zeroed(random_adapter(1, 4)), 1)])
    assert all(not module.delta().any() and module.delta().isfinite().all() for module in merged.modules.values())


def test_an_adapter_cut_in_two_gives_the_same_approximation():
    terms = [(random_adapter(1, 6), 0.8), (random_adapter(2, 3), -0.6)]
    first, second = halves(terms[0][0])
    wanted = {name: svd(at_module(terms, name), 4) for name in modules_of(terms)}
    assert_agree(merge_terms("svd", [(first, 0.8), (second, 0.8), terms[1]], {"rank": 4}), wanted, slack=3)


@pytest.mark.parametrize(
    ("coefficient", "lost"),
    [
        (torch.ones(160), 1e-4),  # singular values hardly differ: the slowest case
        (0.97 ** torch.arange(160), 1e-9),
        (0.9 ** torch.arange(160), 1e-9),
        (torch.where(torch.arange(160) == 5, 1e3, 1.0), 1e-9),
        (torch.where(torch.arange(160) % 2 == 0, 1.0, -0.999), 1e-9),  # of copies, see below: differences of 0.1 %
    ],
    ids=["even", "slow decay", "fast decay", "one huge", "copies that nearly cancel"],
)
@pytest.mark.parametrize("k", [1, 16, 48])
def test_block_iteration_keeps_the_energy_that_can_be_kept(coefficient, lost, k):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 160, width, generator=generator, dtype=torch.float64) for width in (300, 280))
    coefficient = coefficient.double().expand(2, -1)
    if coefficient.min() < 0:
        a, b = (x[:, ::2].repeat_interleave(2, dim=1) for x in (a, b))
    left, sigma, right = leading(a @ a.mT, b @ b.mT, coefficient, k, torch.finfo(torch.float32).eps)
    total = b.mT @ (coefficient[:, :, None] * a)
    u, v, wanted = left @ b, right @ a, torch.linalg.svdvals(total)
    torch.testing.assert_close(u @ u.mT, torch.eye(k, dtype=torch.float64).expand(2, k, k), rtol=0, atol=1e-6)
    torch.testing.assert_close(u @ total @ v.mT, torch.diag_embed(sigma), rtol=0, atol=1e-6 * sigma.max().item())
    energy = wanted[:, :k].square().sum(1)
    assert (
        torch.linalg.norm(total - u.mT @ (sigma[:, :, None] * v), dim=(1, 2)).square()
        <= wanted[:, k:].square().sum(1) + lost * energy
    ).all()
