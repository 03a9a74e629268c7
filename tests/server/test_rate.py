"""Token buckets: how many merges at once, how soon again, and that they are forgotten."""

import random

import pytest

from server.errors import RateLimitedError, body_of, headers_of, status_of
from server.rate import ColdMergeRate


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def taken(rate: ColdMergeRate, client: str, tries: int) -> int:
    """How many of so many tries get a token."""
    got = 0
    for _ in range(tries):
        try:
            rate.take(client)
        except RateLimitedError:
            continue
        got += 1
    return got


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 1000])
def test_a_full_bucket_has_as_many_tokens_as_the_limit_and_is_full_again_after_a_minute(limit: int) -> None:
    clock = Clock()
    rate = ColdMergeRate(limit, clock)
    for _ in range(3):
        assert taken(rate, "ann", limit + 5) == limit
        clock.now += 60


@pytest.mark.parametrize("limit", [1, 7, 60, 1000])
def test_who_comes_again_when_told_gets_a_token_and_no_sooner_than_a_second_before(limit: int) -> None:
    clock = Clock()
    rate = ColdMergeRate(limit, clock)
    taken(rate, "ann", limit)
    with pytest.raises(RateLimitedError) as refused:
        rate.take("ann")
    wait = refused.value.retry_after
    assert isinstance(wait, int)
    assert wait - 1 < max(60 / limit, 1) <= wait
    clock.now += wait
    rate.take("ann")


def test_over_any_time_no_more_than_the_limit_and_what_that_time_brings() -> None:
    clock, random_ = Clock(), random.Random(1)
    rate, got, began = ColdMergeRate(10, clock), 0, clock.now
    for _ in range(2000):
        clock.now += random_.random() * 3
        got += taken(rate, "ann", random_.randrange(3))
        assert got <= 10 + (clock.now - began) / 6 + 1e-3
    assert got > (clock.now - began) / 6 - 10


def test_clients_have_buckets_of_their_own_and_refusals_cost_nothing() -> None:
    clock = Clock()
    rate = ColdMergeRate(1, clock)
    assert taken(rate, "ann", 100) == taken(rate, "bob", 1) == 1
    clock.now += 60
    assert taken(rate, "ann", 1) == 1


def test_buckets_that_are_full_again_are_forgotten_and_their_number_is_bounded() -> None:
    clock = Clock()
    rate = ColdMergeRate(5, clock)
    for client in range(20_000):
        rate.take(str(client))
    assert len(rate._full_at) == 10_000
    clock.now += 61
    assert len(rate._full_at) == 0


def test_a_refusal_says_when_to_come_again() -> None:
    error = RateLimitedError("slower", retry_after=7)
    assert status_of(error) == body_of(error)["error"]["code"] == 429
    assert headers_of(error) == {"retry-after": "7"}
