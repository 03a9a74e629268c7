"""What is merged, as those who run the server see it: listed, built ahead and pinned, evicted, and freed with its sources."""

import asyncio
from collections import Counter
from collections.abc import Iterator

from merging.errors import shown
from server.catalog import Recipe
from server.composer import Composer
from server.engine import Engine
from server.errors import ConflictError, NotFoundError
from server.lease import Lease
from server.slots import Entry


class Cache:
    """Admins' hold on the composer; on its event loop.

    A **pin** keeps a merged adapter in its slot though nobody leases it. It counts for no client, so it takes from nobody's
    share. One slot at least is left without: else whatever is not pinned could never be served.
    """

    def __init__(self, composer: Composer, engine: Engine) -> None:
        self._composer = composer
        self._engine = engine
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def entries(self) -> list[Entry]:
        """All that is resident or being built, what waits for a slot included."""
        return list(self._composer.entries.values())

    @property
    def slots(self) -> int:
        return self._composer.slots.count

    @property
    def free_slots(self) -> int:
        return self.slots - len(self._composer.slots.taken)

    @property
    def most_pins(self) -> int:
        return self.slots - 1

    def idle_seconds(self) -> list[tuple[Entry, float]]:
        """Every entry, and how long ago a lease of it began or ended; the one unused for longest comes first."""
        now = self._composer.slots.clock()
        idle = [(entry, now - max(entry.last_used.values())) for entry in self.entries]
        return sorted(idle, key=lambda pair: -pair[1])

    def is_pinned(self, key: str) -> bool:
        entry = self._composer.entries.get(key)
        return entry is not None and entry.pinned

    def compositions(self) -> Counter[str]:
        """How many merged adapters of each source are resident, by its digest."""
        resident = (entry.recipe for entry in self.entries if entry.resident is not None)
        return Counter(digest for recipe in resident for digest in {source.digest for source in recipe.sources})

    async def warm(self, recipe: Recipe, client: str, *, pin: bool) -> Lease:
        """Have `recipe` resident, and keep it from giving way if `pin`; returns a lease that has ended, for what it says.

        Raises:
            ConflictError: where there are too many pins.
            LoramixError: see Composer.ensure.
        """
        if pin:
            self._check_pins(recipe.key)
        lease = await self._composer.ensure(recipe, client)
        try:
            if pin:
                self._check_pins(recipe.key)
                self._composer.entries[recipe.key].pinned = True
        finally:
            lease.release()
        return lease

    async def evict(self, key: str) -> None:
        """Empty the slot of a merged adapter, pinned or not.

        Raises:
            NotFoundError: for a key of nothing that is resident or being built.
            ConflictError: while requests use it, or wait for it.
        """
        entry = self._composer.entries.get(key)
        if entry is None:
            raise NotFoundError(f"nothing of key {shown(key)} here; GET /v1/lora/cache lists what there is")
        if entry.leases or entry.resident is None:
            raise ConflictError(
                f"{entry.recipe.name} is leased by {entry.leases.total()} requests; try again when they have ended"
            )
        await self._composer.evict(entry)

    def retire(self, digest: str) -> asyncio.Task[None]:
        """Free a source that no name means any more, in slots and memory, once no request uses it; pins do not count.

        The task ends when that is done, or where `recall` says that a name means it again; it goes on if nobody waits for it.
        """
        self._composer.retired.add(digest)
        task = asyncio.create_task(self._retire(digest))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    def recall(self, digest: str) -> None:
        """A name means this content again."""
        self._composer.retired.discard(digest)

    async def _retire(self, digest: str) -> None:
        retired, keys = self._composer.retired, set()
        while digest in retired and (using := list(self._made_of(digest))):
            idle = next((entry for entry in using if entry.resident is not None and not entry.leases), None)
            if idle is None:
                await self._composer.slots.changed()
            else:
                keys.add(idle.recipe.key)
                await self._composer.evict(idle)
        if digest in retired:
            used_bytes = await self._engine.forget([digest, *sorted(keys)])
            self._composer.metrics.show_source_bytes(used_bytes)
            retired.discard(digest)

    def _made_of(self, digest: str) -> Iterator[Entry]:
        """What is resident or being built of a source, dropped builds that have not let go of their slot included."""
        for entry in dict.fromkeys([*self.entries, *self._composer.slots.taken]):
            if any(source.digest == digest for source in entry.recipe.sources):
                yield entry

    def _check_pins(self, key: str) -> None:
        pinned = [entry.recipe.name for entry in self.entries if entry.pinned and entry.recipe.key != key]
        if len(pinned) >= self.most_pins:
            raise ConflictError(
                f"{len(pinned)} of {self.slots} slots are pinned, and one has to be left for all else; "
                "unpin one (DELETE /v1/lora/cache/KEY), or start the server with more --max-loras"
            )
