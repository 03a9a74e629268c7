"""The adapter store: source adapters by content, in memory that is bounded and allocated once.

Two tiers on a GPU: pinned host memory, and a part of the device's memory, from which merges read. On a CPU the host
tier is the only one. An adapter costs nothing until a merge needs it; then it stays in each tier until others need the room.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition, Lock

import torch

from merging import LoraAdapter, RecipeError
from server.arena import Arena
from server.reader import Readable, Reader
from server.tier import Entry, Tier, factors, size_of


@dataclass(frozen=True)
class Held:
    """Source adapters that stay where they are while a merge reads them.

    Attributes:
        adapters: by name, where merges read.
        tiers: how many were found on the `device`, in the `host`'s memory, and on `disk`.
        seconds: `load` (from disk) and `copy` (to where merges read; waiting for room there included).
    """

    adapters: dict[str, LoraAdapter]
    tiers: dict[str, int]
    seconds: dict[str, float]


class _Gone(Exception):  # noqa: N818  (no error: a source has left memory meanwhile, and has to be read again)
    pass


class AdapterStore:
    """Source adapters, read from disk when they are needed; any thread may ask.

    Args:
        device: where merges read them.
        host_bytes: of host memory, pinned where the device is a GPU.
        device_bytes: of the GPU's memory; without meaning on a CPU.
    """

    def __init__(self, device: torch.device, host_bytes: int, device_bytes: int) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._host = Tier("host", Arena(host_bytes, torch.device("cpu"), pinned=cuda))
        self._near = Tier("device", Arena(device_bytes, device)) if cuda else self._host  # where merges read
        self._reader = Reader()
        self._changed = Condition()  # guards the tiers; told when a use ends
        self._filling = Lock()  # one merge at a time takes room: no two hold half of what they need and wait for each other

    @contextlib.contextmanager
    def acquire(self, sources: Sequence[Readable]) -> Iterator[Held]:
        """All of `sources`, to read until the block ends. On a GPU its end waits for the current stream's work.

        Raises:
            LoramixError: what reading one raised, see Readable.
            RecipeError: for sources that do not fit all together.
        """
        started = time.perf_counter()
        load_seconds = 0.0
        loaded: dict[str, LoraAdapter] = {}
        with self._changed:
            found = {source.digest: self._where(source.digest) for source in sources}
            held = self._use_all(found) if set(found.values()) == {self._near.name} else None
        while held is None:
            reading = time.perf_counter()
            for source in self._on_disk(sources):
                loaded[source.digest] = loaded.get(source.digest) or self._reader.read(source)
            load_seconds += time.perf_counter() - reading
            with self._filling, contextlib.suppress(_Gone):
                held = self._fill(sources, loaded)
        loaded.clear()
        copy_seconds = time.perf_counter() - started - load_seconds
        try:
            adapters = {source.name: held[source.digest].adapter for source in sources}
            yield Held(adapters, dict(Counter(found.values())), {"load": load_seconds, "copy": copy_seconds})
        finally:
            self._synchronize()
            self._release(held.values())

    def used_bytes(self) -> dict[str, int]:
        """Bytes that adapters take up, by tier."""
        with self._changed:
            return {tier.name: tier.used_bytes for tier in (self._host, self._near)}

    def has(self, digest: str) -> bool:
        """Whether an adapter is in memory."""
        with self._changed:
            return self._where(digest) != "disk"

    def forget(self, digests: Iterable[str]) -> None:
        """Free what these take up; what is in use stays, and leaves as all else does. Waits for no merge and for no disk."""
        with self._changed:
            for digest in digests:
                for tier in (self._near, self._host):
                    tier.forget(digest)

    def _where(self, digest: str) -> str:
        """The name of the nearest tier that has it, or `disk`. Needs the lock."""
        return next((tier.name for tier in (self._near, self._host) if digest in tier.entries), "disk")

    def _on_disk(self, sources: Iterable[Readable]) -> list[Readable]:
        with self._changed:
            return [source for source in sources if self._where(source.digest) == "disk"]

    def _use_all(self, digests: Iterable[str]) -> dict[str, Entry]:
        return {digest: self._near.use(digest) for digest in digests if digest in self._near.entries}

    def _release(self, entries: Iterable[Entry]) -> None:
        with self._changed:
            for entry in entries:
                entry.users -= 1
            self._changed.notify_all()

    def _fill(self, sources: Sequence[Readable], loaded: Mapping[str, LoraAdapter]) -> dict[str, Entry]:
        """The entries of all sources where merges read, brought there from host memory or from `loaded`, and in use.

        Raises:
            _Gone: where one is in neither any more.
        """
        digests = {source.digest: source for source in sources}
        with self._changed:
            held = self._use_all(digests)
        staged: list[Entry] = []  # in use in host memory while they are copied from there
        try:
            origins = {digest: self._origin(digest, loaded, staged) for digest in digests if digest not in held}
            self._check_size(digests, held, origins)
            for digest, origin in origins.items():
                held[digest] = self._room_for(_adapter_of(origin), held)
                _copy(origin, held[digest])
            self._synchronize()
        except BaseException:
            self._synchronize()
            self._abandon(held)
            raise
        finally:
            self._release(staged)
        with self._changed:
            self._near.entries.update(held)
        return held

    def _origin(self, digest: str, loaded: Mapping[str, LoraAdapter], staged: list[Entry]) -> Entry | LoraAdapter:
        """Where a source is copied from: host memory, on its way from disk if there is room, or else what was loaded."""
        if self._host is not self._near:
            with self._changed:
                if digest in self._host.entries:
                    staged.append(self._host.use(digest))
                    return staged[-1]
                entry = self._host.room_for(loaded[digest]) if digest in loaded else None
            if entry is not None:
                _copy(loaded[digest], entry)
                with self._changed:
                    self._host.entries[digest] = entry
                staged.append(entry)
                return entry
        if digest not in loaded:
            raise _Gone
        return loaded[digest]

    def _check_size(
        self, sources: Mapping[str, Readable], held: Mapping[str, Entry], origins: Mapping[str, Entry | LoraAdapter]
    ) -> None:
        sizes = {sources[digest].name: size_of(_adapter_of(source)) for digest, source in {**held, **origins}.items()}
        if sum(sizes.values()) > self._near.arena.nbytes:
            listed = ", ".join(f"{name} ({size / 2**30:.3g} GiB)" for name, size in sorted(sizes.items()))
            option = "--adapter-host-gib" if self._near is self._host else "--adapter-gpu-gib"
            raise RecipeError(
                f"the adapters {listed} do not fit together in the {self._near.arena.nbytes / 2**30:.3g} GiB that this server "
                f"has for adapters; use fewer, or start it with a larger {option}",
                "adapters",
            )

    def _room_for(self, adapter: LoraAdapter, held: dict[str, Entry]) -> Entry:
        """Room where merges read, as soon as enough others have ended."""
        with self._changed:
            while (entry := self._near.room_for(adapter)) is None:
                if self._near.users == sum(digest in self._near.entries for digest in held):
                    # Nobody else is to be waited for: what is held lies across the gaps. Start afresh, from empty memory.
                    for digest in list(self._near.entries):
                        self._near.evict(digest)
                        del held[digest]
                    raise _Gone
                self._changed.wait()
        return entry

    def _abandon(self, held: Mapping[str, Entry]) -> None:
        """Give back what was taken for sources that cannot be brought after all."""
        with self._changed:
            for digest, entry in held.items():
                if digest not in self._near.entries:
                    self._near.arena.give(entry.memory)
        self._release(held.values())

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _adapter_of(source: Entry | LoraAdapter) -> LoraAdapter:
    return source.adapter if isinstance(source, Entry) else source


def _copy(origin: Entry | LoraAdapter, entry: Entry) -> None:
    """Fill an entry; from another tier in one copy, which on a GPU is queued on the current stream."""
    if isinstance(origin, Entry):
        entry.memory.copy_(origin.memory, non_blocking=True)
    else:
        for factor, source in zip(factors(entry.adapter), factors(origin), strict=True):
            factor.copy_(source)
