"""The simulation against closed forms."""

import dataclasses

import numpy as np
import pytest
from fleet_harness import COSTS, TOKENS

from benchmarks.fleet.routing import PLACES, Ring
from benchmarks.fleet.simulate import Fleet, simulate
from benchmarks.fleet.theory import che_hit_rate, erlang_c, mdc_wait
from benchmarks.fleet.traffic import Population, Traffic, traffic, zipf

INSTANT = dataclasses.replace(COSTS, first_seconds=0.0, token_seconds=1e-9, way_seconds=0.0, merge_seconds=0.0)
SMALL = Population(adapters=100, compositions=2_000, terms=2, weightings=1)


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("slots", [10, 100])
def test_slots_hit_as_often_as_che_says_when_nothing_takes_any_time(exponent, slots) -> None:
    asked = traffic(dataclasses.replace(SMALL, exponent=exponent), 40_000, 1.0, 3)
    fleet = Fleet(replicas=1, router="hash", slots=slots, tokens=TOKENS, device=100, host=100)
    found = simulate(fleet, INSTANT, asked).figures["hit_rate"]
    assert found == pytest.approx(che_hit_rate(zipf(2_000, exponent), slots), abs=0.012)


def test_hashing_makes_the_slots_of_all_replicas_one_cache_and_random_routing_does_not() -> None:
    asked = traffic(SMALL, 60_000, 1.0, 4)
    for router, slots in (("hash", 80), ("random", 10)):
        fleet = Fleet(replicas=8, router=router, slots=10, tokens=TOKENS, device=100, host=100)
        found = simulate(fleet, INSTANT, asked).figures["hit_rate"]
        assert found == pytest.approx(che_hit_rate(zipf(2_000, 1.0), slots), abs=0.025)


@pytest.mark.parametrize(("servers", "tolerance"), [(1, 0.06), (4, 0.08)])
def test_requests_wait_for_seats_as_in_a_queue_of_constant_service(servers, tolerance) -> None:
    costs = dataclasses.replace(COSTS, seats=servers)
    rate = 0.7 * costs.capacity(TOKENS)
    times = np.cumsum(np.random.default_rng(5).exponential(1 / rate, 60_000))
    one = Traffic(np.zeros(len(times), np.int64), times, np.zeros(1, np.int64), np.zeros((1, 1), np.int32))
    found = simulate(Fleet(replicas=1, router="hash", tokens=TOKENS), costs, one, warm=0.1).figures
    expected = mdc_wait(servers, rate, costs.request_seconds(TOKENS))
    assert found["seat_wait_ms_mean"] == pytest.approx(1e3 * expected, rel=tolerance)
    assert found["seats_busy"] == pytest.approx(0.7, rel=0.02)


def test_closed_forms_are_those_of_the_books() -> None:
    assert erlang_c(1, 0.3) == pytest.approx(0.3)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert mdc_wait(1, 0.5, 1.0) == pytest.approx(0.5)  # Pollaczek and Khinchine: ρ s / (2 (1 − ρ))
    assert che_hit_rate(np.full(100, 0.01), 25) == pytest.approx(0.25)  # all alike: as many as fit
    assert che_hit_rate(zipf(10, 1.0), 10) == 1.0


@pytest.mark.parametrize("replicas", [8, 64])
def test_replicas_own_even_parts_of_the_ring(replicas) -> None:
    """Parts vary by 1/√places, as sums of so many random arcs do."""
    ring = Ring(replicas)
    owners = np.array(ring.replicas)[ring.starts(np.arange(200_000))]
    parts = np.bincount(owners, minlength=replicas) * replicas / len(owners)
    assert parts.std() == pytest.approx(PLACES**-0.5, rel=0.5)


def test_a_replica_more_takes_keys_from_the_others_and_moves_none_among_them() -> None:
    keys = np.arange(50_000)
    before, after = (np.array(ring.replicas)[ring.starts(keys)] for ring in (Ring(10), Ring(11)))
    moved = before != after
    assert set(after[moved]) == {10}
    assert moved.mean() == pytest.approx(1 / 11, rel=0.35)
