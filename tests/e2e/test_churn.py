"""Far more compositions than slots, at once and with clients that hang up: every answer is that of its own composition.

The expected answers come from transformers with each composition's ΔW in the weights, so a mixed-up slot, a slot that is read
while it is written, or a prefix cached for another composition would be seen.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from churn import churn, compositions
from live import LiveServer, until
from tiny import save_tiny_adapter, tiny_server

SLOTS = 7


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twelve")
    for seed in range(12):
        save_tiny_adapter(root / f"a{seed}", seed, rank=4)
    return root


@pytest.fixture
def served(tiny: Path, twelve: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """Blocks of the prefix cache shorter than the prompt, so that it is used."""
    with tiny_server(tiny, twelve, tmp_path / "log", "--block-size", "32", slots=SLOTS) as server:
        yield server


def memory_of(server: LiveServer) -> list[int]:
    """Resident bytes of each process of it."""
    return [process.memory_info().rss for process in server.processes()]


@pytest.mark.parametrize(("requests", "recipes"), [(300, 40), pytest.param(10_000, 500, marks=pytest.mark.long)])
def test_in_a_crowd_every_answer_is_its_own_compositions_and_memory_stays_as_it_is(
    served: LiveServer, tiny: Path, twelve: Path, requests: int, recipes: int
) -> None:
    chosen = compositions(tiny, twelve, recipes)
    sizes: dict[int, list[int]] = {}

    def seen(count: int) -> None:
        if count in (2_000, 10_000):
            sizes[count] = memory_of(served)

    ended = asyncio.run(churn(served.url, chosen, requests, seen=seen))
    print(f"{dict(ended)}; MiB at { ({count: [size >> 20 for size in each] for count, each in sizes.items()}) }")
    assert set(ended) == {"right", "left"}
    assert ended["right"] > 0.9 * requests
    until(served.is_idle)
    assert served.metric("loramix_evictions_total") > requests / 3
    assert served.metric("vllm:prefix_cache_hits_total") > 0
    assert served.metric("loramix_merges_total", outcome="error") == 0
    assert served.has_slots([each.recipe for each in chosen[:SLOTS]])
    until(served.is_idle)
    if requests >= 10_000:
        for early, late in zip(sizes[2_000], sizes[10_000], strict=True):
            assert late < 1.05 * early
