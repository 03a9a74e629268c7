"""The adapters of a running server: those given at start, and those added, replaced and deleted since."""

import asyncio
from collections.abc import Mapping
from typing import Literal
from weakref import WeakValueDictionary

from merging import AdapterError, LoramixError
from merging.errors import shown
from server.allowed import Allowed
from server.cache import Cache
from server.catalog import Catalog, CatalogEntry
from server.errors import ConflictError, NotFoundError
from server.kept import Kept, KeptAdapter
from server.metrics import Metrics
from server.preset_index import PresetIndex
from server.wanted import Wanted

MOST = 10_000
"""Adapters at most that can be added."""
_READERS = 2  # adapters fetched, read and checked at a time; each is in memory twice then
_NAMED = 5  # presets that a message names

Outcome = Literal["added", "unchanged", "replaced"]


class Adapters:
    """Changes the catalog, on its event loop. Reading goes on beside it.

    Attributes:
        origins: where those come from that were added, by name. kept: the names of those in the state folder.
        skipped: why adapters that were kept are not there, by name.
        given: names that the command line has; it has them again at the next start.
    """

    def __init__(
        self, catalog: Catalog, presets: PresetIndex, cache: Cache, allowed: Allowed, state: Kept, metrics: Metrics
    ) -> None:
        self._catalog = catalog
        self._presets = presets
        self._cache = cache
        self._allowed = allowed
        self._state = state
        self._metrics = metrics
        self._readers = asyncio.Semaphore(_READERS)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by name, of those who add it
        self.origins: dict[str, KeptAdapter] = {}
        self.kept: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.given = frozenset(catalog.entries)
        self._count()

    @property
    def all(self) -> Mapping[str, CatalogEntry]:
        return self._catalog.entries

    def restore(self) -> None:
        """Add what was kept, but for names that the command line has, and for what is not there, not the same or not allowed
        any more. To be called before the server has requests."""
        for name, origin in self._state.adapters.items():
            try:
                self._put(self._again(name, origin, fetch=False), origin, kept=True)
            except LoramixError as error:
                self.skipped[name] = str(error)

    async def learn(self, name: str) -> None:
        """Add, or replace, what another server has kept under this name since; what cannot be used is in `skipped`."""
        async with self._turns.setdefault(name, asyncio.Lock()):
            try:
                origin = await asyncio.to_thread(self._state.read, "adapters", name)
                if not isinstance(origin, KeptAdapter) or (name in self.kept and self.origins[name] == origin):
                    return
                async with self._readers:
                    entry = await asyncio.to_thread(self._again, name, origin, fetch=True)
                async with self._state.changing:
                    self._refuse_taken(name)
                    self._replace(entry, origin, kept=True)
            except LoramixError as error:
                self.skipped[name] = str(error)

    async def forget(self, name: str) -> None:
        """Remove what another server has deleted, but for what a preset is made of that only this one has."""
        async with self._state.changing:
            if not await self._state.has("adapters", name):
                self.skipped.pop(name, None)
                if name in self.kept and not self._presets.using(name):
                    self._drop(name)

    def _again(self, name: str, origin: KeptAdapter, *, fetch: bool) -> CatalogEntry:
        """A kept adapter, checked. May be called on any thread; raises LoramixError for one that cannot be used here."""
        if name in self.given:
            raise ConflictError("the command line has an adapter of this name")
        self._refuse_taken(name)
        wanted = Wanted(origin.path, origin.repo, origin.revision)
        entry, _ = wanted.read(name, self._catalog, self._allowed, fetch=fetch)
        if entry.source.digest != origin.digest:
            raise AdapterError(f"{entry.source.path} holds another adapter than the one that was added; add it again")
        return entry

    async def add(self, name: str, wanted: Wanted) -> Outcome:
        """Have `name` mean the adapter that lies there now. Requests that run under what it meant before go on.

        Raises:
            ForbiddenError: where adapters may not be added from there.
            AdapterError: for one that cannot be used; the old one stays.
            ConflictError: for a name that a preset or the base model has; where presets are made for other content; where
                there are too many.
            StateError: where it cannot be kept.
        """
        async with self._turns.setdefault(name, asyncio.Lock()):  # so the last to ask is the last to be added
            self._refuse_taken(name)
            async with self._readers:
                entry, origin = await asyncio.to_thread(wanted.read, name, self._catalog, self._allowed, fetch=True)
            async with self._state.changing:
                return await self._change(entry, origin)

    async def remove(self, name: str) -> None:
        """Have `name` mean nothing, at once; returns when the requests that use it have ended and it is freed everywhere.

        Raises:
            NotFoundError: for a name of none.
            ConflictError: naming the presets that use it.
            StateError: where it cannot be deleted from the state folder.
        """
        async with self._state.changing:
            entry = self._catalog.entries.get(name)
            if entry is None and name not in self.skipped:
                raise NotFoundError(f"no adapter {shown(name)} here; GET /v1/lora/adapters lists them")
            using = self._presets.using(name)
            if using:
                raise ConflictError(f"adapter {name!r} is used by {_listed(using)}; delete or replace these first")
            await self._state.remove("adapters", name)
            self.skipped.pop(name, None)
            freed = None if entry is None else self._drop(name)
        if freed is not None:
            await asyncio.shield(freed)

    async def _change(self, entry: CatalogEntry, origin: KeptAdapter) -> Outcome:
        name, digest = entry.source.name, entry.source.digest
        self._refuse_taken(name)  # what was free before the reading
        if bound := self._presets.made_for_other(name, digest):
            raise ConflictError(
                f"{_listed(bound)} is made for the content that adapter {name!r} has now; delete that first, "
                "or add this one under another name"
            )
        old = self._catalog.entries.get(name)
        if old is None and len(self._catalog.entries) - len(self.given) >= MOST:
            raise ConflictError(f"{MOST} adapters have been added, which is the most; delete some")
        kept = name not in self.given and await self._state.write("adapters", name, origin)
        return self._replace(entry, origin, kept=kept)

    def _replace(self, entry: CatalogEntry, origin: KeptAdapter, *, kept: bool) -> Outcome:
        old = self._catalog.entries.get(entry.source.name)
        self._put(entry, origin, kept=kept)
        if old is None:
            return "added"
        if old.source.digest == entry.source.digest:
            return "unchanged"
        if not self._catalog.has(old.source.digest):
            self._cache.retire(old.source.digest)  # nobody waits for that
        return "replaced"

    def _drop(self, name: str) -> asyncio.Future[None] | None:
        """Have `name` mean nothing; where nothing else means its content, what is done when that is freed everywhere."""
        digest = self._catalog.entries[name].source.digest
        self._catalog.remove(name)
        self.origins.pop(name, None)
        self.kept.discard(name)
        self._count()
        return None if self._catalog.has(digest) else self._cache.retire(digest)

    def _refuse_taken(self, name: str) -> None:
        if name in self._catalog.reserved or name in self._presets.specs:
            raise ConflictError(f"{shown(name)} is the name of a preset or of the base model; choose another")

    def _put(self, entry: CatalogEntry, origin: KeptAdapter, *, kept: bool) -> None:
        name = entry.source.name
        self._catalog.put(entry)
        self._cache.recall(entry.source.digest)
        self.origins[name] = origin
        (self.kept.add if kept else self.kept.discard)(name)
        self.skipped.pop(name, None)
        self._count()

    def _count(self) -> None:
        self._metrics.adapters.set(len(self._catalog.entries))


def _listed(presets: list[str]) -> str:
    more = f" and {len(presets) - _NAMED} more" if len(presets) > _NAMED else ""
    return f"preset{'s' if len(presets) > 1 else ''} {', '.join(presets[:_NAMED])}{more}"
