"""The GPU's paths give what the CPU's give."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference.adapters import motley, random_adapter
from reference.tolerance import assert_same_bytes

from merging import METHODS, MergeSpec, Term, merge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ELEMENTWISE = {"linear", "magnitude", "ties", "dare"}
# Directions near the Gram matrices' float32 noise may be dropped on one device and kept on the other.
SLACK = {"core-ties": 0.05, "tsv": 5e-3, "iso": 5e-3, "svd": 1e-3}
WIDE = {f"model.layers.{i}.{kind}": (96, 160) if kind == "q" else (200, 72) for i in range(3) for kind in "qv"}


def of(method, dtype):
    if method in ELEMENTWISE:
        return [(random_adapter(seed, 8, shapes=WIDE, dtype=dtype), weight) for seed, weight in ((1, 0.7), (2, -0.4), (3, 1.1))]
    return (
        motley(dtype)
        if dtype == torch.float32
        else [(random_adapter(s, 7 + s, shapes=WIDE, dtype=dtype), 0.5) for s in range(4)]
    )


def merged(method, terms, device, dtype=torch.float32):
    adapters = {f"a{i}": adapter for i, (adapter, _) in enumerate(terms)}
    spec = MergeSpec.create(method, [Term(f"a{i}", weight) for i, (_, weight) in enumerate(terms)])
    return merge(adapters, spec, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_gpu_and_cpu_agree(method, dtype):
    terms = of(method, dtype)
    on_cpu, on_gpu = merged(method, terms, "cpu"), merged(method, terms, "cuda")
    for name, module in on_cpu.modules.items():
        wanted, given = module.delta(), on_gpu.modules[name].delta().cpu()
        assert torch.linalg.norm(given - wanted) <= SLACK.get(method, 1e-5) * torch.linalg.norm(wanted), name


@pytest.mark.parametrize("method", sorted(METHODS))
def test_equal_keys_give_equal_bytes(method):
    terms = of(method, torch.bfloat16)
    assert_same_bytes(
        merged(method, terms, "cuda", torch.bfloat16).to("cpu"), merged(method, terms[::-1], "cuda", torch.bfloat16).to("cpu")
    )


@pytest.mark.parametrize("method", ["core-ties", "lego"])
def test_a_layout_gives_the_same_bytes_eagerly_captured_and_replayed(method):
    terms = [(random_adapter(s, 40, shapes=WIDE, dtype=torch.bfloat16), 0.5) for s in range(4)]
    first, *others = [merged(method, terms, "cuda", torch.bfloat16).to("cpu") for _ in range(4)]
    for other in others:
        assert_same_bytes(first, other)


def test_merges_of_threads_are_captured_while_another_draws_random_numbers():
    """As an engine's sampler does at every step; torch's own capture would have it fail."""
    terms = {
        rank: [(random_adapter(s, rank, shapes=WIDE, dtype=torch.bfloat16), 0.5) for s in range(3)] for rank in (5, 6, 7, 9)
    }
    wanted = {rank: merged("lego", some, "cuda", torch.bfloat16).to("cpu") for rank, some in terms.items()}

    def again(rank):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [merged("lego", terms[rank], "cuda", torch.bfloat16) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
        return [result.to("cpu") for result in results]

    with ThreadPoolExecutor(len(terms)) as threads:
        running = {rank: threads.submit(again, rank) for rank in terms}
        while not all(future.done() for future in running.values()):
            torch.rand(1000, device="cuda").exponential_()
    for rank, future in running.items():
        for result in future.result():
            assert_same_bytes(wanted[rank], result)
