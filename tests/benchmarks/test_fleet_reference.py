"""The simulation of a replica against one written the long way, and its memories against a list."""

import random

import numpy as np
import pytest
from fleet_harness import COSTS, TOKENS, Reference

from benchmarks.fleet.replica import Replica
from benchmarks.fleet.simulate import Fleet, simulate
from benchmarks.fleet.tiers import Lru
from benchmarks.fleet.traffic import Traffic


def traffic_of(requests: list[tuple[float, int]], compositions: int) -> Traffic:
    times, asked = zip(*requests, strict=True)
    numbers = np.arange(compositions)
    return Traffic(np.array(asked), np.array(times), numbers, numbers[:, None].astype(np.int32))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("slots", "gap"), [(1, 2.0), (3, 0.4), (8, 0.2)])
def test_every_request_is_served_as_by_the_replica_written_the_long_way(seed, slots, gap) -> None:
    draw = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(150):
        now += draw.expovariate(1 / gap)
        requests.append((now, min(int(draw.paretovariate(0.7)) - 1, 19)))
    fleet = Fleet(replicas=1, router="hash", slots=slots, tokens=TOKENS, device=100, host=100)
    found = simulate(fleet, COSTS, traffic_of(requests, 20), warm=0.0)
    expected = Reference(slots).serve(requests)
    assert found.tally.hits == sum(hit for hit, _ in expected)
    assert sorted(found.tally.first_tokens) == pytest.approx(sorted(seconds for _, seconds in expected))


@pytest.mark.parametrize("capacity", [0, 1, 5])
def test_a_memory_keeps_what_was_used_last(capacity) -> None:
    draw, memory, expected = random.Random(capacity), Lru(capacity), []
    for _ in range(2000):
        item = draw.randrange(9)
        assert memory.use(item) == (item in expected)
        if item not in expected or draw.random() < 0.5:
            memory.put(item)
        expected = [*(other for other in expected if other != item), item][-capacity:] if capacity else []
        assert len(memory) == len(expected)


def test_a_build_costs_what_its_sources_cost(monkeypatch) -> None:
    """Four sources: read once, then in memory, then of the merged adapter in the folder only one file is read."""
    import dataclasses

    costs = dataclasses.replace(COSTS, read_seconds=10.0, host_seconds=0.125)
    work: list[float] = []
    measured = Replica._work
    monkeypatch.setattr(Replica, "_work", lambda self, composition: work.append(measured(self, composition)) or work[-1])
    rows = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], np.int32)
    asked = [0, 1, 0, 2, 0, 3]
    traffic = Traffic(np.array(asked), 100.0 * np.arange(1, 7), np.arange(4), rows)
    fleet = Fleet(replicas=1, router="hash", slots=1, tokens=TOKENS, device=4, host=4, folder=0, own_disk=10)
    outcome = simulate(fleet, costs, traffic, warm=0.0)
    first = 1 + 4 * 10.125
    # 1 shares the sources of 0, which is then merged again: quicker than to read it. 2 pushes them out of memory, so that 0 is
    # read as it was merged. 3 has never been there.
    assert work == pytest.approx([first, 1.0, 1.0, first, 10.125, first])
    assert (outcome.tally.merged, outcome.tally.read) == (5, 1)
    assert outcome.moved.folder == 12  # no source twice
    assert outcome.moved.own_disk == 1
