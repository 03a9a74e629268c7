"""The rule of thumb: how much one replica serves, on paper. `loramix bench fleet` says how far off it is."""

import math

from benchmarks.fleet.costs import Costs
from benchmarks.fleet.replica import THREADS
from benchmarks.fleet.theory import che_hit_rate
from benchmarks.fleet.traffic import Population, zipf

SEATS_USED = 0.8
THREADS_USED = 0.5
"""How busy either may be on average before those who wait are too many."""


def hit_rate(population: Population, slots: int, replicas: int, *, hashed: bool) -> float:
    """The share of requests that find their composition in a slot.

    By Che's approximation, with the slots of one replica; with those of all, where equal compositions go to the same one.
    """
    popularity = zipf(population.compositions, population.exponent)
    return che_hit_rate(popularity, slots * replicas if hashed else slots)


def load(costs: Costs, tokens: int, hits: float, reads: float) -> float:
    """The share of its warm capacity that a replica can serve: what its seats, or else its helper threads, allow.

    Args:
        hits: share of requests.
        reads: adapter files that a build has to read, on average.
    """
    work = costs.merge_seconds + reads * costs.read_seconds
    builds = THREADS_USED * THREADS / work
    misses = 1 - hits
    return min(SEATS_USED, builds / misses / costs.capacity(tokens) if misses else math.inf)
