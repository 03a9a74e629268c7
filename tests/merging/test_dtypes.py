"""Every method against its float64 reference, in every dtype of the sources and the result."""

import pytest
import torch
from reference.adapters import ONE, at_module, merge_terms, modules_of, random_adapter
from reference.cat import cat
from reference.core import core_ties, iso, tsv
from reference.elementwise import dare, magnitude, ties
from reference.linear import linear
from reference.svd import svd
from reference.tolerance import TOLERANCE, assert_agree

# Method: its options, and its reference on the terms of a module; lego has test_lego.py, for clusters are many.
METHODS = {
    "cat": ({}, lambda terms, _: cat(terms)),
    "linear": ({}, lambda terms, _: linear(terms)),
    "magnitude": ({"density": 0.3}, lambda terms, _: magnitude(terms, 0.3)),
    "ties": ({"density": 0.3}, lambda terms, _: ties(terms, 0.3)),
    "dare": ({"density": 0.6, "seed": 7}, lambda terms, name: dare(terms, 0.6, name, seed=7)),
    "svd": ({"rank": 3}, lambda terms, _: svd(terms, 3)),
    "core-ties": ({"rank": 3, "density": 0.4}, lambda terms, _: core_ties(terms, 3, 0.4)),
    "tsv": ({"rank": 3}, lambda terms, _: tsv(terms, 3)),
    "iso": ({"rank": 3}, lambda terms, _: iso(terms, 3)),
}


def terms_of(dtype):
    """Four of rank 3 with weights of both signs, in the order of their digests."""
    shapes = {"model.layers.0.self_attn.q_proj": (20, 16), "model.layers.1.mlp.down_proj": (16, 24)}
    weights = (0.7, -1.3, 0.45, 0.9)
    terms = [(random_adapter(seed, 3, alpha=seed, shapes=shapes, dtype=dtype), w) for seed, w in enumerate(weights, start=1)]
    return sorted(terms, key=lambda term: term[0].digest)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_what_its_reference_says(method, dtype):
    options, reference = METHODS[method]
    terms = terms_of(dtype)
    wanted = {name: reference(at_module(terms, name), name) for name in modules_of(terms)}
    assert_agree(merge_terms(method, terms, options, dtype), wanted, dtype, slack=3)


@pytest.mark.parametrize("consensus", ["linear", "ties"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(("density", "seed"), [(0.2, 0), (0.5, 1), (0.9, 2**31 - 1)])
def test_dare_drops_what_its_hash_says(consensus, majority, density, seed):
    terms = terms_of(torch.float32)
    options = {"density": density, "seed": seed, "consensus": consensus, "majority": majority}
    wanted = {
        name: dare(at_module(terms, name), density, name, seed=seed, consensus=consensus, majority=majority)
        for name in modules_of(terms)
    }
    assert_agree(merge_terms("dare", terms, options), wanted, slack=3)


def test_dare_leaves_the_sum_of_the_factors_as_its_expectation():
    """Masks of A and of B are independent, so it is that of ΔW too: the mean of many seeds is linear, but for 1 / √seeds."""
    terms = [(random_adapter(seed, 3, shapes=ONE), weight) for seed, weight in ((1, 0.7), (2, -0.4))]
    name = next(iter(ONE))
    draws = torch.stack([merge_terms("dare", terms, {"density": 0.5, "seed": s}).modules[name].delta() for s in range(400)])
    error = torch.linalg.norm(draws.mean(dim=0) - linear(at_module(terms, name)))
    spread = torch.linalg.norm(draws.std(dim=0)) / 400**0.5
    assert error < 1.5 * spread
    assert spread < 0.1 * torch.linalg.norm(linear(at_module(terms, name)))  # small enough to notice a missing rescale
