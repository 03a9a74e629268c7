"""What a merge holds at its peak, as torch's CPU allocator counts it: inputs, output and 20 % at most."""

import pytest
import torch
from reference.adapters import random_adapter
from torch.profiler import ProfilerActivity, profile

from merging import METHODS, LoraAdapter, MergeSpec, Term, merge

# Wide and many, so that neither the small N × N problems nor a piece that is worked on weighs much beside the factors.
SHAPES = {f"model.layers.{layer}.{kind}_proj": (4096, 4096) for layer in range(40) for kind in "qo"}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.1, "d": 0.3}


def wide(without=lambda place, layer: False) -> dict[str, LoraAdapter]:
    adapters = {}
    for place, name in enumerate(WEIGHTS):
        absent = [module for layer, module in enumerate(SHAPES) if without(place, layer)]
        adapters[name] = random_adapter(place, 8, shapes=SHAPES, without=absent, dtype=torch.bfloat16).to("cpu")
        assert adapters[name].digest  # worked out before anything is counted
    return adapters


@pytest.fixture(scope="module")
def alike():
    return wide()


@pytest.fixture(scope="module")
def ragged():
    """Each adapter misses other modules, so that no two lie alike in memory."""
    return wide(without=lambda place, layer: layer % 4 == place)


def peak_bytes(work):
    """(the most that torch held of what `work` allocated, what it returned); freed by its end or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("layout", ["alike", "ragged"])
def test_a_merge_holds_its_output_and_little_more(request, layout, method):
    adapters = request.getfixturevalue(layout)
    spec = MergeSpec.create(method, [Term(name, weight) for name, weight in WEIGHTS.items()])
    peak, merged = peak_bytes(lambda: merge(adapters, spec))
    both = sum(adapter.nbytes for adapter in adapters.values()) + merged.nbytes
    assert peak >= merged.nbytes
    assert peak - merged.nbytes <= 0.2 * both, f"{(peak - merged.nbytes) / both:.0%} over inputs and output"


def test_the_count_sees_what_torch_allocates_and_frees():
    peak, _ = peak_bytes(lambda: [torch.ones(1 << 20), torch.ones(1 << 20) + torch.ones(1 << 20)][:0])
    assert peak == pytest.approx(4 * 4 << 20, rel=0.01)
