"""The clock: requests come and are routed, and what replicas put off is done in the order of time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count

from benchmarks.fleet.costs import Costs
from benchmarks.fleet.replica import THREADS, Replica
from benchmarks.fleet.routing import router
from benchmarks.fleet.tally import Tally
from benchmarks.fleet.tiers import Lru, Moved, Storage
from benchmarks.fleet.traffic import Traffic


@dataclass(frozen=True)
class Fleet:
    """What is simulated. Capacities are in adapters.

    Attributes:
        router: see ROUTERS.
        tokens: of each answer.
        device, host: of each replica's adapter store.
        own_disk: of each replica's own disk cache.
        folder: merged adapters in the folder that all share; it begins with the most popular ones.
        held: sources in each replica's host memory at the beginning.
        clients: who ask one request after another without a pause, so that the times of the traffic do not count; None where
            requests come by themselves.
    """

    replicas: int = 1
    router: str = "full"
    slots: int = 16
    tokens: int = 128
    device: int = 25
    host: int = 51
    own_disk: int = 0
    folder: int = 0
    held: int = 0
    clients: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        figures: of the requests that count; see Tally, and `_figures`.
        ended: requests, in all.
        replicas: as they are at the end.
    """

    figures: dict[str, float]
    tally: Tally
    moved: Moved
    ended: int
    replicas: list[Replica]


class _Clock:
    """Things to do, by their time; of equal times, as they were put off."""

    def __init__(self) -> None:
        self._todo: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()

    def later(self, time: float, what: Callable[[float], None]) -> None:
        heappush(self._todo, (time, next(self._order), what))

    def run(self, until: float) -> None:
        """Do all that is to be done by then."""
        todo = self._todo
        while todo and todo[0][0] <= until:
            time, _, what = heappop(todo)
            what(time)

    def run_one(self) -> float:
        """Do the next thing; its time."""
        time, _, what = heappop(self._todo)
        what(time)
        return time


def simulate(fleet: Fleet, costs: Costs, traffic: Traffic, *, warm: float = 0.5, seed: int = 0) -> Outcome:
    """Serve all of `traffic`.

    Args:
        warm: the share of requests that come before any counts.
    """
    clock, tally, moved = _Clock(), Tally(), Moved()
    loads = [0] * fleet.replicas
    route = router(fleet.router, traffic, loads, costs.seats, seed)
    asked = [0] * fleet.replicas
    ended = 0
    freed = 0  # clients whose next request is to come now

    def end(replica: int, _: float) -> None:
        nonlocal ended, freed
        loads[replica] -= 1
        ended += 1
        freed += 1

    replicas = _replicas(fleet, costs, traffic, tally, moved, clock, end)
    first = int(warm * len(traffic.times))
    compositions, times = traffic.compositions.tolist(), traffic.times.tolist()
    now = begin = 0.0
    for number, composition in enumerate(compositions):
        if fleet.clients is None:
            now = times[number]
            clock.run(now)
        else:
            while number >= fleet.clients + freed:
                now = clock.run_one()
        if number == first:
            begin = now
            tally.reset()
            vars(moved).update(vars(Moved()))
        replica = route(number)
        loads[replica] += 1
        asked[replica] += number >= first
        replicas[replica].ask(now, composition, number >= first)
    figures = _figures(fleet, costs, tally, moved, asked, now - begin)
    counted = Moved(**vars(moved))
    clock.run(math.inf)
    return Outcome(figures | tally.waits(), tally, counted, ended, replicas)


def _replicas(
    fleet: Fleet, costs: Costs, traffic: Traffic, tally: Tally, moved: Moved, clock: _Clock,
    end: Callable[[int, float], None],
) -> list[Replica]:  # fmt: skip
    sources = traffic.sources
    folder = Lru(fleet.folder)
    for composition in range(min(fleet.folder, len(traffic.sets)) - 1, -1, -1):  # the most popular one is used last
        folder.put(sources + composition)

    def sources_of(composition: int) -> list[int]:
        row: list[int] = traffic.adapters[traffic.sets[composition]].tolist()
        return row

    made = []
    for number in range(fleet.replicas):
        storage = Storage(Lru(fleet.device), Lru(fleet.host), Lru(fleet.own_disk), folder, sources, moved)
        for source in range(fleet.held):
            storage.host.put(source)
        seconds = costs.request_seconds(fleet.tokens)
        made.append(Replica(costs, storage, fleet.slots, seconds, sources_of, tally, clock.later, partial(end, number)))
    return made


def _figures(fleet: Fleet, costs: Costs, tally: Tally, moved: Moved, asked: list[int], seconds: float) -> dict[str, float]:
    """Rates of the fleet at the moment at which no more requests come.

    `busiest_over_mean` compares replicas by the requests that were sent to them. Gigabytes are 10^9 bytes.
    """
    requests = sum(asked)
    gb = costs.nbytes / 1e9 / seconds
    return {
        "requests_per_s": requests / seconds,
        "seats_busy": requests / seconds / fleet.replicas / costs.capacity(fleet.tokens),
        "busiest_over_mean": max(asked) * fleet.replicas / requests,
        **tally.rates(seconds, THREADS * fleet.replicas),
        "reads_per_build": (moved.folder + moved.own_disk) / max(1, tally.builds),
        "folder_read_gb_per_s": moved.folder * gb,
        "folder_written_gb_per_s": moved.written_folder * gb,
        "own_disk_read_gb_per_s": moved.own_disk * gb,
        "own_disk_written_gb_per_s": moved.written_own * gb,
    }
