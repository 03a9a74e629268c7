"""Closed forms that know nothing of the simulation: tests hold it to them, and the rule of thumb uses one."""

import math

import numpy as np
from numpy.typing import NDArray


def che_hit_rate(popularity: NDArray[np.float64], slots: float) -> float:
    """The hit rate of an LRU cache under independent requests, by Che's approximation (Che, Tung and Wang, 2002).

    An item is there if it was asked for within the last T requests, T being such that as many items as fit are expected there.
    """
    if slots >= len(popularity):
        return 1.0
    low, high = 0.0, float(len(popularity)) / float(popularity.min())
    for _ in range(100):
        middle = (low + high) / 2
        if -np.expm1(-popularity * middle).sum() < slots:
            low = middle
        else:
            high = middle
    return float((popularity * -np.expm1(-popularity * low)).sum())


def erlang_c(servers: int, load: float) -> float:
    """The probability that one who comes to M/M/c has to wait; `load` in Erlang, below `servers`."""
    blocked = 1.0
    for busy in range(1, servers + 1):
        blocked = load * blocked / (busy + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


def mdc_wait(servers: int, rate: float, seconds: float) -> float:
    """The mean wait in M/D/c: half of M/M/c's, with the correction of Cosmetatos (1976); exact for one server."""
    load = rate * seconds
    busy = load / servers
    exponential = erlang_c(servers, load) * seconds / (servers - load)
    correction = (1 - busy) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2) / (16 * busy * servers)
    return exponential / 2 * (1 + correction)
