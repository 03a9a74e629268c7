"""One replica: slots under leases, helper threads that build, and seats in which requests decode.

Slots as in server/slots.py for clients that are all alike: what nobody leases gives way, unused for longest first; builds that
find none wait in line. Builds as in server/merger.py and server/disk_rule.py: two helper threads, and whatever is quicker of
merging and reading what was merged before.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapreplace

from benchmarks.fleet.costs import Costs
from benchmarks.fleet.tally import Tally
from benchmarks.fleet.tiers import Storage

THREADS = 2  # of server/merger.py

Later = Callable[[float, Callable[[float], None]], None]  # have something done at a time


@dataclass(slots=True, eq=False)
class Entry:
    """A composition that is being built, or resident. `waiting`: when each request that waits for it came, and if it counts."""

    composition: int
    leases: int = 0
    resident: bool = False
    waiting: list[tuple[float, bool]] = field(default_factory=list)


class Replica:
    """Runs on the clock of whoever calls it, in the order of time.

    Args:
        slots: merged adapters that it holds at a time.
        sources_of: the adapters of a composition.
        seconds: that a request has its seat.
        later: see Later.
        ended: told of the end of each request.
    """

    def __init__(
        self,
        costs: Costs,
        storage: Storage,
        slots: int,
        seconds: float,
        sources_of: Callable[[int], list[int]],
        tally: Tally,
        later: Later,
        ended: Callable[[float], None],
    ) -> None:
        self._costs, self._storage, self._seconds, self._sources_of = costs, storage, seconds, sources_of
        self._tally, self._later, self._ended = tally, later, ended
        self._free = slots
        self._entries: dict[int, Entry] = {}
        self._idle: OrderedDict[int, Entry] = OrderedDict()  # resident and leased by nobody, by the end of the last lease
        self._line: deque[Entry] = deque()
        self._seats = [0.0] * costs.seats  # when each is free again
        self._threads = [0.0] * THREADS
        self._slots = slots

    def ask(self, now: float, composition: int, counts: bool) -> None:
        """A request comes."""
        entry = self._entries.get(composition)
        if entry is not None and entry.resident:
            self._tally.hits += counts
            if not entry.leases:
                del self._idle[composition]
            entry.leases += 1
            self._sit_down(now, now, entry, counts)
            return
        self._tally.misses += counts
        if entry is None:
            entry = self._entries[composition] = Entry(composition)
            self._line.append(entry)
            self._hand_out(now)
        else:
            self._tally.joined += counts
        entry.leases += 1
        entry.waiting.append((now, counts))

    def taken(self) -> int:
        """Slots that are taken; those of entries in line are none."""
        return self._slots - self._free

    def leases(self) -> int:
        return sum(entry.leases for entry in self._entries.values())

    def _hand_out(self, now: float) -> None:
        while self._line and (self._free or self._idle):
            if self._free:
                self._free -= 1
            else:
                del self._entries[self._idle.popitem(last=False)[0]]
            entry = self._line.popleft()
            self._later(self._build(now, entry), lambda then, entry=entry: self._built(then, entry))

    def _build(self, now: float, entry: Entry) -> float:
        """When it is done. A thread takes builds in order, so the time is known at once."""
        work = self._work(entry.composition)
        begun = max(now, self._threads[0])
        heapreplace(self._threads, begun + work)
        self._tally.thread_seconds += work
        return begun + work + self._costs.way_seconds

    def _work(self, composition: int) -> float:
        """Seconds of a helper thread for a build; by the rule of server/disk_rule.py."""
        storage, costs = self._storage, self._costs
        sources = self._sources_of(composition)
        merged = storage.sources + composition
        if storage.in_memory(merged):
            self._tally.copied += 1
            return costs.host_seconds if storage.take(merged) == "host" else 0.0
        absent = sum(not storage.in_memory(source) for source in sources)
        if absent and storage.on_disk(merged):
            self._tally.read += 1
            storage.take(merged)
            return costs.read_seconds + costs.host_seconds
        self._tally.merged += 1
        seconds = costs.merge_seconds
        for source in sources:
            tier = storage.take(source)
            self._tally.sources[tier] += 1
            if tier != "device":
                seconds += costs.host_seconds + (costs.read_seconds if tier == "disk" else 0.0)
        if absent:  # reading it would have been quicker than this
            storage.keep_merged(merged)
        return seconds

    def _built(self, now: float, entry: Entry) -> None:
        entry.resident = True
        for came, counts in entry.waiting:
            self._sit_down(now, came, entry, counts)
        entry.waiting.clear()

    def _sit_down(self, now: float, came: float, entry: Entry, counts: bool) -> None:
        """A request whose composition is resident decodes as soon as a seat is free; in order, so the time is known at once."""
        begun = max(now, self._seats[0])
        heapreplace(self._seats, begun + self._seconds)
        if counts:
            self._tally.sat_down(came, now, begun, self._costs.first_seconds)
        self._later(begun + self._seconds, lambda then: self._leave(then, entry))

    def _leave(self, now: float, entry: Entry) -> None:
        entry.leases -= 1
        if not entry.leases:
            self._idle[entry.composition] = entry
            self._hand_out(now)
        self._ended(now)
