"""Traffic: what is drawn has the shares, the newcomers and the crowd that were asked for."""

import numpy as np
import pytest

from benchmarks.fleet.traffic import Population, traffic, zipf

POPULATION = Population(adapters=50, compositions=200, terms=4, weightings=3, exponent=1.1)


def test_requests_are_asked_by_the_power_law() -> None:
    asked = traffic(POPULATION, 200_000, 10.0, 1).compositions
    shares = np.bincount(asked, minlength=200) / len(asked)
    expected = np.arange(1, 201) ** -1.1
    assert shares == pytest.approx(expected / expected.sum(), abs=0.004)
    assert zipf(200, 1.1).sum() == pytest.approx(1.0)


def test_requests_come_at_random_times() -> None:
    gaps = np.diff(traffic(POPULATION, 100_000, 10.0, 2).times)
    assert gaps.mean() == pytest.approx(0.1, rel=0.02)
    assert gaps.std() == pytest.approx(0.1, rel=0.02)  # exponential


def test_no_adapter_is_twice_in_a_composition_and_few_sets_are_alike() -> None:
    drawn = traffic(POPULATION, 10, 1.0, 3)
    assert all(len(set(row)) == 4 for row in drawn.adapters.tolist())
    assert np.bincount(drawn.sets).max() == 3
    assert len(drawn.sets) == 200
    assert drawn.sources == drawn.adapters.max() + 1


def test_new_compositions_come_as_often_as_was_said_and_what_they_replace_is_asked_no_more() -> None:
    drawn = traffic(POPULATION, 50_000, 10.0, 4, new_per_hour=720)
    hours = drawn.times[-1] / 3600
    new = np.unique(drawn.compositions[drawn.compositions >= 200])
    assert len(drawn.sets) - 200 == pytest.approx(720 * hours, rel=0.15)
    assert 0.5 < len(new) / (len(drawn.sets) - 200) <= 1  # what is hardly popular may never be asked for
    last_old = max(np.flatnonzero(drawn.compositions == 0))
    first_heir = next(place for place in range(last_old + 1, len(drawn.compositions)) if drawn.compositions[place] >= 200)
    assert drawn.times[last_old] < drawn.times[first_heir]
    # All places together are asked for as before: the shares of old and new add up.
    assert (drawn.compositions < 200).mean() < 0.7


def test_a_crowd_wants_one_thing_from_its_moment_on() -> None:
    drawn = traffic(POPULATION, 40_000, 10.0, 5, flash_share=0.1, flash_from=0.25)
    crowd = drawn.compositions == 200
    assert not crowd[:10_000].any()
    assert crowd[10_000:].mean() == pytest.approx(0.1, abs=0.006)
    assert len(drawn.sets) == 201


def test_a_seed_draws_the_same_again() -> None:
    first, second, other = (traffic(POPULATION, 500, 1.0, seed, new_per_hour=9) for seed in (6, 6, 7))
    assert (first.compositions == second.compositions).all()
    assert (first.times == second.times).all()
    assert (first.adapters == second.adapters).all()
    assert (first.compositions != other.compositions).any()
