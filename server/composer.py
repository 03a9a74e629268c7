"""The composer: makes sure that what a request asks for is in the engine, and stays there while it runs.

One entry a content key. Whoever comes first starts the build; everybody else waits for that build (single flight).
A lease keeps an entry. When a slot is needed, an entry without a lease gives way: of the client that holds the most slots, the
one whose last lease ended longest ago; with one client that is plain LRU. Builds that find no slot wait in line, those of
clients that hold the least first. So nobody can push out what others use by asking for ever new recipes; server/fairness.py
has the rules, server/slots.py the slots. A build that nobody waits for any more is dropped.

Runs on one event loop and awaits nothing between looking at its state and changing it, so it needs no locks.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

from server.catalog import Recipe
from server.engine import Engine, Resident
from server.errors import BusyError, OutOfMemoryError, OverloadedError
from server.lease import Built, Lease
from server.metrics import Metrics
from server.rate import ColdMergeRate
from server.slots import Entry, Slots

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own


class Composer:
    """Leases of merged adapters.

    Args:
        engine: where they are built.
        slots: how many the engine holds at once.
        timeout: seconds that a request waits for a slot and its build at most.
        metrics: where everything is counted.
        longest_line: builds that wait for a slot at most.
        builds_per_minute: that each client may begin; None for no limit.
        clock: seconds, monotonic.

    Attributes:
        retired: digests of source adapters that have lost their name; of them nothing new is merged.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        timeout: float,
        metrics: Metrics,
        longest_line: int = 64,
        builds_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._timeout = timeout
        self.metrics = metrics
        self.retired: set[str] = set()
        self._entries: dict[str, Entry] = {}
        self._slots = Slots(slots, longest_line, metrics, self._forget, clock)
        self._rate = ColdMergeRate(builds_per_minute, clock) if builds_per_minute is not None else None

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is resident or being built, by content key."""
        return self._entries

    @property
    def slots(self) -> Slots:
        return self._slots

    async def ensure(self, recipe: Recipe, client: str) -> Lease:
        """A lease of `recipe` for `client`, built if it is not resident.

        Raises:
            RateLimitedError: when the client has begun its builds of this minute. Only beginning one counts: what is
                resident, or being built already, is free.
            OverloadedError: when too many builds wait for a slot.
            BusyError: when the wait is over before the build.
            LoramixError: what the build raised; the next request for the key tries again.
        """
        if not self.retired.isdisjoint(source.digest for source in recipe.sources):  # since the recipe was looked up
            raise BusyError(f"an adapter of {recipe.name} has just been replaced or deleted; try again")
        entry = self._entries.get(recipe.key)
        hit = entry is not None and entry.resident is not None
        self.metrics.cache_requests.labels(tier="device", result="hit" if hit else "miss").inc()
        if entry is None:
            if self._rate is not None:
                self._rate.take(client)
            entry = self._entries[recipe.key] = Entry(recipe)
            entry.build = asyncio.create_task(self._build(entry))
        self._slots.lease(entry, client)
        self.metrics.leases.inc()
        end = partial(self._release, entry, client)
        lease = Lease(entry.recipe.name, recipe.key, "device" if hit else "merged", 0.0, end)
        if hit:
            return lease
        started = time.perf_counter()
        try:
            with self.metrics.waiting.track_inprogress():
                await asyncio.wait_for(asyncio.shield(entry.build), self._timeout)
        except TimeoutError:
            lease.release()
            raise BusyError(f"{entry.recipe.name} was not ready within {self._timeout:g} s; try again shortly") from None
        except BaseException:
            lease.release()
            raise
        assert entry.resident is not None, "its build has ended well"
        if entry.resident.disk == "hit":
            lease.tier = "disk"
        lease.built = Built(entry.had_slot, entry.was_done, entry.resident.seconds)
        lease.waited_ms = (time.perf_counter() - started) * 1e3
        return lease

    async def evict(self, entry: Entry) -> None:
        """Take out of its slot, pinned or not, what is resident and not leased."""
        resident = entry.resident
        assert resident is not None, "it is resident"
        assert not entry.leases, "nobody uses it"
        self._forget(entry)
        entry.resident = None  # nobody can be given its slot before the engine has let go of it
        left: Resident | None = resident
        try:
            await self._engine.evict(resident)
            left = None
        finally:
            self._slots.put_back(entry, left)

    async def settled(self) -> None:
        """Returns once no build is under way, nor waits for a slot."""
        while builds := [entry.build for entry in self._entries.values() if entry.resident is None]:
            await asyncio.wait(builds)

    async def _build(self, entry: Entry) -> None:
        method = entry.recipe.spec.method.name
        try:
            victim = await self._slots.take(entry)
            entry.had_slot = time.time_ns()
            try:
                resident = await self._engine.build(entry.recipe, victim)
            except BaseException:
                self._slots.put_back(entry, None)
                raise
        except BaseException as error:
            if self._entries.get(entry.recipe.key) is entry:  # not dropped
                del self._entries[entry.recipe.key]
            outcome = _outcome(error)
            self.metrics.merges.labels(method=method, outcome=outcome).inc()
            if outcome in ("error", "oom"):
                reason = str(error)  # whoever keeps the record would keep the error's frames as well
                logger.warning("%s could not be merged: %s", entry.recipe.name, reason)
            raise
        entry.resident, entry.was_done = resident, time.time_ns()
        self.metrics.merges.labels(method=method, outcome="ok").inc()
        self.metrics.add(resident)

    def _release(self, entry: Entry, client: str) -> None:
        self.metrics.leases.dec()
        self._slots.release(entry, client)
        if self._entries.get(entry.recipe.key) is not entry:
            return  # its build failed
        if entry.resident is None and not entry.leases:
            del self._entries[entry.recipe.key]  # whoever asks for it from now on starts anew
            entry.build.cancel()
        else:
            self._slots.hand_out()

    def _forget(self, entry: Entry) -> None:
        """An entry gives way to another."""
        assert entry.resident is not None, "only what is resident is evicted"
        del self._entries[entry.recipe.key]
        self.metrics.remove(entry.resident)


def _outcome(error: BaseException) -> str:
    match error:
        case asyncio.CancelledError():
            return "dropped"
        case OutOfMemoryError():
            return "oom"
        case OverloadedError():
            return "refused"
    return "error"
