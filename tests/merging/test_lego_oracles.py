"""What lego must give whatever its clusters are, and where the clusters are known beforehand."""

import math

import pytest
import torch
from reference.adapters import merge_terms, of_units, permuted, random_adapter
from reference.cat import cat
from reference.lego import lego
from reference.tolerance import assert_agree

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize(("output", "gain"), [("sqrt-r/k", math.sqrt(4 / 8)), ("sqrt-n/k", 1), ("none", 1)])
def test_as_many_clusters_as_units_is_the_scaled_sum(norm, output, gain):
    one, other = random_adapter(1, 3), random_adapter(2, 5, alpha=3)
    merged = merge_terms("lego", [(one, 0.6), (other, -1.1)], {"rank": 8, "norm": norm, "output": output})
    wanted = {name: gain * cat([(one.modules[name], 0.6), (other.modules[name], -1.1)]) for name in one.modules}
    assert_agree(merged, wanted)


@pytest.mark.parametrize("copies", [2, 3, 8])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("labels", ["raw", "unit"])
@pytest.mark.parametrize("canonical", [False, True])
def test_permuted_copies_of_one_adapter_give_it_back(copies, norm, labels, canonical):
    adapter = random_adapter(1, 6)
    options = {"rank": 6, "norm": norm, "labels": labels, "canonical": canonical}
    merged = merge_terms("lego", [(permuted(adapter, seed), 1) for seed in range(copies)], options)
    assert_agree(merged, {name: module.delta() for name, module in adapter.modules.items()})


def test_the_same_adapter_several_times_gives_it_back():
    adapter = random_adapter(1, 5)
    assert_agree(merge_terms("lego", [(adapter, -0.5)] * 3), {n: -0.5 * m.delta() for n, m in adapter.modules.items()})


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 2, 0.9), (-1, -1.2, -0.8)])
def test_planted_groups_are_found_and_averaged(norm, weights):
    """Four well-separated prototypes, of which each adapter has a noisy copy of some: the clusters are known."""
    generator = torch.Generator().manual_seed(5)
    prototypes_a, prototypes_b = 5 * torch.randn(4, 12, generator=generator), 5 * torch.randn(14, 4, generator=generator)
    terms, labels = [], []
    for weight, members in zip(weights, ([0, 1, 2, 3], [3, 1], [2, 0, 3]), strict=True):
        a = prototypes_a[members] + 0.05 * torch.randn(len(members), 12, generator=generator)
        b = prototypes_b[:, members] + 0.05 * torch.randn(14, len(members), generator=generator)
        terms.append((of_units(a, b), weight))
        labels += members
    merged = merge_terms("lego", terms, {"rank": 4, "norm": norm, "labels": "unit"})
    wanted = lego([(adapter.modules[NAME], weight) for adapter, weight in terms], labels, 4, norm=norm)
    assert_agree(merged, {NAME: wanted})


def test_one_cluster_is_the_mean_of_all_units():
    terms = [(random_adapter(1, 3), 0.8), (random_adapter(2, 2), 0.5)]
    merged = merge_terms("lego", terms, {"rank": 1})
    modules = terms[0][0].modules
    wanted = {name: lego([(adapter.modules[name], w) for adapter, w in terms], [0] * 5, 1) for name in modules}
    assert_agree(merged, wanted, slack=10)  # the mean of random units is short


def test_one_unit_is_itself():
    adapter = random_adapter(1, 1)
    assert_agree(merge_terms("lego", [(adapter, -0.7)]), {n: -0.7 * m.delta() for n, m in adapter.modules.items()})


def test_one_huge_unit_stays_alone_and_spoils_no_other():
    """The huge unit is a cluster of its own, and the groups of the rest are found as if it were not there."""
    generator = torch.Generator().manual_seed(9)
    prototypes_a, prototypes_b = 5 * torch.randn(2, 12, generator=generator), 5 * torch.randn(14, 2, generator=generator)
    noise = [0.02 * torch.randn(2, 12, generator=generator) for _ in range(2)]
    pair = [(of_units(prototypes_a + n, prototypes_b), 1) for n in noise]
    huge = of_units(1e4 * torch.randn(1, 12, generator=generator), 1e4 * torch.randn(14, 1, generator=generator))
    merged = merge_terms("lego", [*pair, (huge, 1)], {"rank": 3, "output": "none"}).modules[NAME]
    wanted = lego([(a.modules[NAME], w) for a, w in pair], [0, 1, 0, 1], 2, output="none") + huge.modules[NAME].delta()
    sizes = merged.a.norm(dim=1)
    rest = sizes < 1e3
    assert rest.sum() == 2
    small = merged.b[:, rest].double() @ merged.a[rest].double()
    wanted = wanted - huge.modules[NAME].delta()
    assert torch.linalg.norm(small - wanted) <= 1e-5 * torch.linalg.norm(wanted)
