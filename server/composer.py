"""The composer: makes sure that what a request asks for is in the engine, and stays there while it runs.

One entry a content key. Whoever comes first starts the build; everybody else waits for that build (single flight).
A lease keeps an entry; among the entries without a lease the one whose last lease ended longest ago is evicted
when a slot is needed. Requests that find every slot leased wait in the order they came. A build that nobody waits for
any more is dropped.

Runs on one event loop and awaits nothing between looking at its state and changing it, so it needs no locks.
"""

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from server.catalog import Recipe
from server.engine import Engine, Resident
from server.errors import BusyError, OutOfMemoryError
from server.metrics import Metrics


@dataclass
class _Entry:
    """A recipe that is being built, or resident."""

    recipe: Recipe
    build: asyncio.Task[None] = field(init=False)
    resident: Resident | None = None
    leases: int = 0


@dataclass
class Lease:
    """The right to use a resident adapter until `release`; releasing twice does no harm.

    Attributes:
        name: what to call it in the engine.
        key: its content key.
        tier: where it came from: `device` (it was resident), `disk` (this request waited for it to come from the disk cache) or
            `merged` (this request waited for the merge).
        waited_ms: milliseconds this request waited for the build; 0 for `device`.
    """

    name: str
    key: str
    tier: str
    waited_ms: float
    _composer: "Composer"
    _entry: _Entry | None

    def release(self) -> None:
        if self._entry is not None:
            entry, self._entry = self._entry, None
            self._composer._release(entry)


class Composer:
    """Leases of merged adapters.

    Args:
        engine: where they are built.
        slots: how many the engine holds at once.
        timeout: seconds that a request waits for a slot and its build at most.
        metrics: where everything is counted.
    """

    def __init__(self, engine: Engine, slots: int, timeout: float, metrics: Metrics) -> None:
        self._engine = engine
        self._timeout = timeout
        self._metrics = metrics
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by end of the last lease
        self._free: list[Resident | None] = [None] * slots  # empty slots, and those of what gives way to the next build
        self._queue: deque[asyncio.Future[Resident | None]] = deque()  # builds that wait for a slot

    async def ensure(self, recipe: Recipe) -> Lease:
        """A lease of `recipe`, built if it is not resident.

        Raises:
            BusyError: when the wait is over before the build.
            LoramixError: what the build raised; the next request for the key tries again.
        """
        entry = self._entries.get(recipe.key)
        hit = entry is not None and entry.resident is not None
        self._metrics.cache_requests.labels(tier="device", result="hit" if hit else "miss").inc()
        if entry is None:
            entry = self._entries[recipe.key] = _Entry(recipe)
            entry.build = asyncio.create_task(self._build(entry))
        entry.leases += 1
        self._metrics.leases.inc()
        lease = Lease(entry.recipe.name, recipe.key, "device" if hit else "merged", 0.0, self, entry)
        if hit:
            return lease
        started = time.perf_counter()
        try:
            with self._metrics.waiting.track_inprogress():
                await asyncio.wait_for(asyncio.shield(entry.build), self._timeout)
        except TimeoutError:
            lease.release()
            raise BusyError(f"{entry.recipe.name} was not ready within {self._timeout:g} s; try again shortly") from None
        except BaseException:
            lease.release()
            raise
        if entry.resident is not None and entry.resident.disk == "hit":
            lease.tier = "disk"
        lease.waited_ms = (time.perf_counter() - started) * 1e3
        return lease

    async def _build(self, entry: _Entry) -> None:
        method = entry.recipe.spec.method.name
        try:
            victim = await self._slot()
            try:
                resident = await self._engine.build(entry.recipe, victim)
            except BaseException:
                self._return_slot(None)
                raise
        except BaseException as error:
            if self._entries.get(entry.recipe.key) is entry:  # not dropped
                del self._entries[entry.recipe.key]
            self._metrics.merges.labels(method=method, outcome=_outcome(error)).inc()
            raise
        entry.resident = resident
        self._metrics.merges.labels(method=method, outcome="ok").inc()
        self._metrics.add(resident)

    async def _slot(self) -> Resident | None:
        """Reserve a slot: None for a free one, or what has to leave its slot."""
        if self._free:
            return self._free.pop()
        for entry in self._entries.values():
            if entry.leases == 0 and entry.resident is not None:
                return self._evict(entry, entry.resident)
        turn: asyncio.Future[Resident | None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came just before
                self._return_slot(turn.result())
            raise

    def _return_slot(self, victim: Resident | None) -> None:
        """Hand a slot on to the build that has waited longest, or keep it for the next."""
        if line := self._line():
            line.popleft().set_result(victim)
        else:
            self._free.append(victim)

    def _line(self) -> deque[asyncio.Future[Resident | None]]:
        """The builds that wait for a slot; who has left the line does not stand at its head."""
        while self._queue and self._queue[0].cancelled():
            self._queue.popleft()
        return self._queue

    def _release(self, entry: _Entry) -> None:
        self._metrics.leases.dec()
        entry.leases -= 1
        if self._entries.get(entry.recipe.key) is not entry:
            return  # its build failed
        self._entries.move_to_end(entry.recipe.key)
        if entry.leases > 0:
            return
        if entry.resident is None:
            del self._entries[entry.recipe.key]  # whoever asks for it from now on starts anew
            entry.build.cancel()
        elif self._line():
            self._return_slot(self._evict(entry, entry.resident))

    def _evict(self, entry: _Entry, resident: Resident) -> Resident:
        del self._entries[entry.recipe.key]
        self._metrics.remove(resident)
        return resident


def _outcome(error: BaseException) -> str:
    match error:
        case asyncio.CancelledError():
            return "dropped"
        case OutOfMemoryError():
            return "oom"
    return "error"
