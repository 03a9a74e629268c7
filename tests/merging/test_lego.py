"""lego against explicit units, at the clusters that loramix found; k-means itself is held by test_kmeans.py."""

import itertools

import pytest
import torch
from reference.adapters import at_module, merge_terms, modules_of, motley
from reference.lego import lego
from reference.tolerance import TOLERANCE, assert_agree
from reference.units import as_points, pool

import merging.methods.lego as under_test


class Clusterings:
    """Every clustering of a merge: the Gram matrices that k-means was asked about, and its labels.

    A merge takes its terms in the order of their digests. Which matrix is which module's is seen from the explicit units.
    """

    def __init__(self, terms):
        self.terms = sorted(terms, key=lambda term: (term[0].digest, term[1]))
        self.asked = []

    def watch(self, monkeypatch, answer=None):
        """Note what k-means is asked and says; `answer(units, k)`, if given, says it in its place."""
        kmeans = under_test.kmeans

        def noted(gram_LNN, k, **options):
            labels_LN = kmeans(gram_LNN, k, **options)
            if answer is not None:
                labels_LN = torch.tensor([answer(gram_LNN.shape[1], k) for _ in gram_LNN])
            self.asked += zip(gram_LNN, labels_LN.tolist(), strict=True)
            return labels_LN

        monkeypatch.setattr(under_test, "kmeans", noted)

    def of(self, name, canonical=False, labels="raw"):
        """(Gram matrix, labels) of a module."""
        points = as_points(pool(at_module(self.terms, name), canonical), unit_length=labels == "unit")
        close = [
            (gram, found)
            for gram, found in self.asked
            if len(gram) == len(points) and torch.allclose(gram, points @ points.T, rtol=1e-5, atol=1e-5)
        ]
        assert len(close) == 1, f"{name}: k-means was not asked about the weighted units"
        return close[0]

    def wanted(self, merged, *, norm="inf", output="sqrt-r/k", canonical=False, labels="raw"):
        return {
            name: lego(
                at_module(self.terms, name), self.of(name, canonical, labels)[1], merged.modules[name].rank,
                norm=norm, output=output, canonical=canonical,
            )
            for name in modules_of(self.terms)
        }  # fmt: skip


CHOICES = list(itertools.product(["inf", "2"], ["sqrt-r/k", "sqrt-n/k", "none"], ["raw", "unit"], [False, True]))


@pytest.mark.parametrize(("norm", "output", "labels", "canonical"), CHOICES)
def test_merged_units_are_the_reweighted_means_of_the_clusters(monkeypatch, norm, output, labels, canonical):
    found = Clusterings(motley())
    found.watch(monkeypatch)
    options = {"rank": 3, "norm": norm, "output": output, "labels": labels, "canonical": canonical}
    merged = merge_terms("lego", motley(), options)
    assert_agree(merged, found.wanted(merged, norm=norm, output=output, canonical=canonical, labels=labels), slack=2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_the_same_holds_in_every_dtype(monkeypatch, dtype, norm):
    found = Clusterings(motley(dtype))
    found.watch(monkeypatch)
    merged = merge_terms("lego", motley(dtype), {"rank": 4, "norm": norm}, dtype=dtype)
    assert_agree(merged, found.wanted(merged, norm=norm), dtype)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("seed", range(6))
def test_any_clusters_will_do_even_empty_ones(monkeypatch, norm, seed):
    """Labels drawn at random: large clusters, single units and empty clusters, none of which k-means need ever find."""
    draw = torch.Generator().manual_seed(seed)
    found = Clusterings(motley())
    found.watch(monkeypatch, answer=lambda units, k: torch.randint(k, (units,), generator=draw).tolist())
    merged = merge_terms("lego", motley(), {"rank": 5, "norm": norm})
    assert_agree(merged, found.wanted(merged, norm=norm), slack=10)  # means of random clusters are short


@pytest.mark.parametrize("labels", ["raw", "unit"])
@pytest.mark.parametrize("canonical", [False, True])
def test_what_is_clustered_is_the_weighted_units(monkeypatch, labels, canonical):
    """√|w c| in both a and b and the sign in b: a slip here changes no merged unit, only which units go together."""
    found = Clusterings(motley())
    found.watch(monkeypatch)
    merge_terms("lego", motley(), {"rank": 2, "labels": labels, "canonical": canonical})
    for name in modules_of(found.terms):
        found.of(name, canonical, labels)


def test_k_means_is_asked_as_the_options_say(monkeypatch):
    asked = []
    kmeans = under_test.kmeans

    def noted(gram_LNN, k, **given):
        asked.append({"k": k, **given})
        return kmeans(gram_LNN, k, **given)

    monkeypatch.setattr(under_test, "kmeans", noted)
    wanted = {"restarts": 5, "rounds": 17, "seed": 99}
    merge_terms("lego", motley(), {"rank": 3, **wanted})
    assert asked
    assert all({"k": 3, **wanted}.items() <= given.items() for given in asked)


def test_the_merged_rank_is_k_or_all_units_where_there_are_fewer():
    merged = merge_terms("lego", motley(), {"rank": 7})
    assert {name: module.rank for name, module in merged.modules.items()} == {
        "model.layers.0.self_attn.q_proj": 7,
        "model.layers.1.self_attn.q_proj": 7,
        "model.layers.0.mlp.up_proj": 4 + 1,
        "model.layers.0.mlp.down_proj": 7,
    }


def test_k_defaults_to_the_largest_rank_in_each_module():
    ranks = {name: module.rank for name, module in merge_terms("lego", motley()).modules.items()}
    assert ranks == {name: max(module.rank for module, _ in at_module(motley(), name)) for name in ranks}
