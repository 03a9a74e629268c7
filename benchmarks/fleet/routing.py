"""Which replica a request is sent to.

Hashing goes by a ring on which every replica has 100 places, as in Ray Serve's ConsistentHashRouter (2.60): a key belongs to
the replica at the next place. A replica that has `seats` requests is full, as there one that has `max_ongoing_requests`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.fleet.traffic import Ids, Traffic

PLACES = 100  # on the ring, of each replica
_RAY_FALLBACKS = 2
_OVER_MEAN = 1.25

Route = Callable[[int], int]  # the number of a request -> of a replica
Loads = list[int]  # requests that each replica has


def spread(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits of each key that look random (splitmix64)."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Ring:
    """Replicas by the places on the ring, and where each key meets it."""

    def __init__(self, replicas: int) -> None:
        places = spread(np.arange(replicas * PLACES, dtype=np.uint64) + np.uint64(1 << 40))
        order = np.argsort(places)
        self._places = places[order]
        self.replicas = [int(replica) for replica in order // PLACES]

    def starts(self, keys: Ids) -> Ids:
        """The index in `replicas` at which each key begins to look."""
        return np.searchsorted(self._places, spread(keys.astype(np.uint64))) % len(self._places)


def router(name: str, traffic: Traffic, loads: Loads, seats: int, seed: int) -> Route:
    """A way to route, by its name in ROUTERS.

    Args:
        loads: read at each request; the caller keeps it up to date.
        seats: requests that one replica runs at a time.
    """
    return ROUTERS[name](traffic, loads, seats, np.random.default_rng(seed))


def _random(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """Any replica."""
    return random.integers(0, len(loads), len(traffic.times)).tolist().__getitem__


def _least(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """The replica with the fewest requests; of equals, any."""
    starts = random.integers(0, len(loads), len(traffic.times)).tolist()

    def route(request: int) -> int:
        start, fewest = starts[request], min(loads)
        try:
            return loads.index(fewest, start)
        except ValueError:
            return loads.index(fewest)

    return route


def _hash(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """The replica that the composition belongs to, whatever it has to do."""
    ring = Ring(len(loads))
    owners = np.array(ring.replicas)[ring.starts(traffic.compositions)]
    return owners.tolist().__getitem__


def _ray(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """Its own replica, or one of the next two if that is full: as Ray Serve does. Where all three are, that of the shortest
    line; there the request would wait in the router until one has room."""
    ring = Ring(len(loads))
    starts = ring.starts(traffic.compositions).tolist()
    most = min(1 + _RAY_FALLBACKS, len(loads))

    def route(request: int) -> int:
        seen: list[int] = []
        place = starts[request]
        while len(seen) < most:
            replica = ring.replicas[place % len(ring.replicas)]
            if replica not in seen:
                if loads[replica] < seats:
                    return replica
                seen.append(replica)
            place += 1
        return min(seen, key=loads.__getitem__)

    return route


def _walk(ring: Ring, starts: Ids, loads: Loads, bound: Callable[[], float]) -> Route:
    """From its own replica along the ring to the first with fewer requests than the bound; the least loaded where none has."""
    places, replicas = starts.tolist(), ring.replicas * 2

    def route(request: int) -> int:
        most, fewest = bound(), min(loads)
        if fewest >= most:
            return loads.index(fewest)
        start = places[request]
        while loads[replicas[start]] >= most:
            start += 1
        return replicas[start]

    return route


def _full(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """Its own replica, or the next along the whole ring that is not full."""
    ring = Ring(len(loads))
    return _walk(ring, ring.starts(traffic.compositions), loads, lambda: seats)


def _mean(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """Its own replica, or the next that has at most 1.25 times the mean: hashing with bounded loads (Mirrokni et al., 2018)."""
    ring = Ring(len(loads))
    return _walk(ring, ring.starts(traffic.compositions), loads, lambda: max(1.0, _OVER_MEAN * (1 + sum(loads)) / len(loads)))


def _adapters(traffic: Traffic, loads: Loads, seats: int, random: np.random.Generator) -> Route:
    """As `full`, by the set of adapters alone: compositions of the same adapters meet, whatever their weights."""
    ring = Ring(len(loads))
    return _walk(ring, ring.starts(traffic.sets[traffic.compositions]), loads, lambda: seats)


ROUTERS: dict[str, Callable[[Traffic, Loads, int, np.random.Generator], Route]] = {
    "random": _random, "least": _least, "hash": _hash, "ray": _ray, "full": _full, "mean": _mean, "adapters": _adapters,
}  # fmt: skip
