"""Whatever is simulated, nothing is lost, and no router breaks its word."""

import numpy as np
import pytest
from fleet_harness import COSTS, TOKENS

from benchmarks.fleet import simulate as simulation
from benchmarks.fleet.routing import ROUTERS, router
from benchmarks.fleet.simulate import Fleet, simulate
from benchmarks.fleet.traffic import Population, traffic

POPULATION = Population(adapters=60, compositions=500, terms=3, weightings=5)
REQUESTS = 4_000


@pytest.mark.parametrize("clients", [None, 30])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("own_disk", "folder"), [(0, 0), (20, 0), (0, 100), (20, 100)])
def test_nothing_is_lost(name, clients, own_disk, folder) -> None:
    asked = traffic(POPULATION, REQUESTS, 0.8 * 5 * COSTS.capacity(TOKENS), 1, new_per_hour=500, flash_share=0.1)
    fleet = Fleet(
        replicas=5, router=name, slots=6, tokens=TOKENS, device=4, host=9, own_disk=own_disk, folder=folder, clients=clients
    )
    outcome = simulate(fleet, COSTS, asked, warm=0.0)
    tally, moved = outcome.tally, outcome.moved
    assert outcome.ended == REQUESTS == tally.hits + tally.misses == len(tally.first_tokens)
    assert sum(replica.leases() for replica in outcome.replicas) == 0
    assert all(replica.taken() <= 6 for replica in outcome.replicas)
    assert tally.copied + tally.read + tally.merged == tally.misses - tally.joined
    assert sum(tally.sources.values()) == 3 * tally.merged
    assert min(tally.first_tokens) >= COSTS.first_seconds
    if clients is None:
        assert moved.folder + moved.own_disk <= tally.sources["disk"] + tally.read
    if not own_disk and not folder:
        assert tally.read == tally.copied == moved.written_own == moved.written_folder == 0


def test_the_same_seed_says_the_same() -> None:
    runs = [simulate(Fleet(replicas=4), COSTS, traffic(POPULATION, 2_000, 20.0, 7), seed=7).figures for _ in range(2)]
    assert runs[0] == runs[1]


def test_what_came_before_does_not_count() -> None:
    asked = traffic(POPULATION, 2_000, 5.0, 2)
    outcome = simulate(Fleet(replicas=2, tokens=TOKENS), COSTS, asked, warm=0.75)
    assert outcome.tally.hits + outcome.tally.misses == 500
    assert outcome.figures["requests_per_s"] == pytest.approx(500 / (asked.times[-1] - asked.times[1500]))


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int, list[int]]]:
    """(request, replica chosen, loads at that moment) of what is simulated after."""
    choices: list[tuple[int, int, list[int]]] = []

    def watched(name, asked, loads, seats, seed):
        route = router(name, asked, loads, seats, seed)

        def watch(request: int) -> int:
            before = list(loads)
            choices.append((request, route(request), before))
            return choices[-1][1]

        return watch

    monkeypatch.setattr(simulation, "router", watched)
    return choices


def _watched(name: str, load: float):
    asked = traffic(POPULATION, REQUESTS, load * 8 * COSTS.capacity(TOKENS), 3)
    simulate(Fleet(replicas=8, router=name, tokens=TOKENS), COSTS, asked)
    return asked


@pytest.mark.parametrize("name", ["full", "adapters"])
def test_no_full_replica_is_chosen_where_another_has_room(seen, name) -> None:
    _watched(name, 0.9)
    assert any(max(loads) >= COSTS.seats for _, _, loads in seen)
    assert all(loads[chosen] < COSTS.seats for _, chosen, loads in seen if min(loads) < COSTS.seats)


def test_bounded_loads_are_bounded(seen) -> None:
    _watched("mean", 0.9)
    assert all(loads[chosen] < max(1.0, 1.25 * (1 + sum(loads)) / 8) for _, chosen, loads in seen)


def test_as_ray_routes_a_composition_has_three_replicas_at_most_and_a_full_one_only_when_all_are(seen) -> None:
    asked = _watched("ray", 1.1)
    homes: dict[int, set[int]] = {}
    for request, chosen, _ in seen:
        homes.setdefault(int(asked.compositions[request]), set()).add(chosen)
    assert max(map(len, homes.values())) == 3
    full = [(request, loads) for request, chosen, loads in seen if loads[chosen] >= COSTS.seats]
    assert full
    assert all(loads[home] >= COSTS.seats for request, loads in full for home in homes[int(asked.compositions[request])])


def test_the_least_loaded_replica_is_one(seen) -> None:
    _watched("least", 0.5)
    assert all(loads[chosen] == min(loads) for _, chosen, loads in seen)
    idle = [chosen for _, chosen, loads in seen if max(loads) == 0]
    assert len(idle) < 8 or len(set(idle)) > 1  # of equals, any


def test_compositions_of_the_same_adapters_meet_as_long_as_nothing_is_full(seen) -> None:
    asked = _watched("adapters", 0.02)
    homes: dict[int, set[int]] = {}
    for request, chosen, loads in seen:
        if max(loads) < COSTS.seats:
            homes.setdefault(int(asked.sets[asked.compositions[request]]), set()).add(chosen)
    assert {len(replicas) for replicas in homes.values()} == {1}
    assert len(np.unique([next(iter(replicas)) for replicas in homes.values()])) == 8
