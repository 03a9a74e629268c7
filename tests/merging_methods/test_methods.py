"""Every method against its float64 reference, and the elementwise ones against PEFT's own functions."""

import math

import peft.utils.merge_utils as theirs
import pytest
import torch
from reference.adapters import at_module, merge_terms, modules_of, motley, random_adapter
from reference.core import core_ties, iso, tsv
from reference.elementwise import magnitude, sides, ties
from reference.tolerance import assert_agree, assert_same_bytes

from merging import METHODS, RecipeError

EQUAL = [(random_adapter(1, 4), 0.7), (random_adapter(2, 4, alpha=3), -1.3), (random_adapter(3, 4, rslora=True), 0.45)]
FEW = [(random_adapter(1, 3), 0.7), (random_adapter(2, 2, alpha=3), -1.3), (random_adapter(3, 4), 0.45)]


def wanted(reference, terms, *args):
    return {name: reference(at_module(terms, name), *args) for name in modules_of(terms)}


@pytest.mark.parametrize("density", [0.1, 0.5, 1])
def test_magnitude(density):
    assert_agree(merge_terms("magnitude", EQUAL, {"density": density}), wanted(magnitude, EQUAL, density))


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 1])
def test_ties(density, majority):
    merged = merge_terms("ties", EQUAL, {"density": density, "majority": majority})
    assert_agree(merged, wanted(ties, EQUAL, density, majority))


@pytest.mark.parametrize(
    ("method", "options", "function"),
    [
        ("linear", {}, lambda x, w: theirs.task_arithmetic(x, w)),
        ("magnitude", {"density": 0.3}, lambda x, w: theirs.magnitude_prune(x, w, 0.3)),
        ("ties", {"density": 0.3}, lambda x, w: theirs.ties(x, w, 0.3, "total")),
        ("ties", {"density": 0.3, "majority": "frequency"}, lambda x, w: theirs.ties(x, w, 0.3, "frequency")),
    ],
)
def test_factors_are_those_of_peft(method, options, function):
    merged = merge_terms(method, EQUAL, options)
    for name, module in merged.modules.items():
        for factor, (parts, weights) in zip((module.a, module.b), sides(at_module(EQUAL, name)), strict=True):
            expected = function([x.float() for x in parts], torch.tensor(weights))
            torch.testing.assert_close(factor, expected, rtol=1e-5, atol=1e-6)


def test_dare_keeps_the_part_asked_for_and_its_expectation():
    wide = {"model.layers.0.mlp.up_proj": (300, 400)}
    adapter = random_adapter(1, 8, alpha=8, shapes=wide)
    merged = merge_terms("dare", [(adapter, 1)], {"density": 0.3})
    for name, module in merged.modules.items():
        for factor, source in ((module.a, adapter.modules[name].a), (module.b, adapter.modules[name].b)):
            kept = factor != 0
            assert abs(kept.float().mean() - 0.3) < 4 * math.sqrt(0.21 / factor.numel())
            torch.testing.assert_close(factor[kept], source[kept] / 0.3)


def test_dare_masks_depend_on_seed_module_and_adapter():
    shapes = {f"model.layers.{i}.q_proj": (50, 40) for i in range(2)}
    adapter = random_adapter(1, 4, shapes=shapes)
    masks = [m.a != 0 for seed in (0, 1) for m in merge_terms("dare", [(adapter, 1)], {"seed": seed}).modules.values()]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4
    assert_same_bytes(merge_terms("dare", EQUAL), merge_terms("dare", EQUAL[::-1]))


def test_dare_of_density_one_is_linear_or_ties():
    assert_same_bytes(merge_terms("dare", EQUAL, {"density": 1}), merge_terms("linear", EQUAL))
    one = {"density": 1, "consensus": "ties"}
    assert_same_bytes(merge_terms("dare", EQUAL, one), merge_terms("ties", EQUAL, {"density": 1}))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_iso(k):
    assert_agree(merge_terms("iso", FEW, {"rank": k}), wanted(iso, FEW, k), slack=100)


@pytest.mark.parametrize("k", [2, 9])
def test_core_ties(k):
    assert_agree(merge_terms("core-ties", FEW, {"rank": k, "density": 0.4}), wanted(core_ties, FEW, k, 0.4), slack=100)


@pytest.mark.parametrize("k", [2, 9])
def test_tsv(k):
    assert_agree(merge_terms("tsv", FEW, {"rank": k}), wanted(tsv, FEW, k), slack=100)


@pytest.mark.parametrize("method", ["core-ties", "tsv", "iso"])
def test_core_methods_take_any_ranks_and_targets(method):
    merged = merge_terms(method, motley())
    assert set(merged.modules) == set(modules_of(motley()))


@pytest.mark.parametrize("method", ["linear", "magnitude", "ties", "dare"])
def test_unequal_ranks_are_refused_with_a_method_that_can(method):
    with pytest.raises(RecipeError, match="svd"):
        merge_terms(method, motley())


@pytest.mark.parametrize("method", ["magnitude", "ties", "dare", "core-ties"])
@pytest.mark.parametrize("density", [0, -0.5, 1.01, math.nan])
def test_a_density_outside_its_range_is_refused(method, density):
    with pytest.raises(RecipeError, match="density"):
        METHODS[method].parse_options({"density": density})
