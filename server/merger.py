"""The merger: merges on helper threads inside the worker, beside the running engine, straight into the engine's slots.

Knows merging and threads, not vLLM. The engine's thread calls `begin` and `drop`, which never wait; what becomes of a
merge is reported by the helper thread that ran it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, local
from typing import Literal

import torch
from cachetools import LRUCache

from merging import DTYPES, LoraAdapter, LoramixError, MergeSpec, Rooms, Term, merge, merge_into, merged_ranks, ranks
from server.disk_tier import DiskTier, NotCachedError, absent_bytes, copy_of
from server.job import Job
from server.reader import SourceFile
from server.reports import Fault, Report
from server.request_facts import RequestFacts, begin
from server.store import AdapterStore

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own

_THREADS = 2  # merges at a time: one computes while another reads
_REMEMBERED = 4096  # jobs that can be merged again without asking the server
OUT_OF_MEMORY = "OutOfMemory"  # the kind of a report


class _Dropped(Exception):  # noqa: N818  (no error: nobody wants the merge any more)
    pass


@dataclass(eq=False)
class _Flight:
    """A merge that is under way: it owns its slot until it has ended.

    Attributes:
        ready: on a GPU, marks the place in the engine's stream before which the slot may still be read.
        disk: whether the merged adapter was found on disk; None where it was not looked for.
        sources: the adapters merged; their factors may be others' by now, their shapes are as they were.
    """

    job: Job
    rooms: Rooms
    begun: float
    ready: torch.cuda.Event | None
    seconds: dict[str, float]
    tiers: dict[str, int] = field(default_factory=dict)
    disk: Literal["hit", "miss"] | None = None
    sources: Mapping[str, LoraAdapter] = field(default_factory=dict)
    dropped: bool = False
    ended: Event = field(default_factory=Event)

    def go_on(self) -> None:
        """Between two phases: raise _Dropped where it has been dropped."""
        if self.dropped:
            raise _Dropped


class Merger:
    """Merges jobs on `device`.

    Args:
        dtype: of the engine's LoRA tensors, by torch's name.
        report: called on the helper thread when a merge has ended and its slot is not written any more.
        disk: where merged adapters outlive their slots, if anywhere.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: str,
        store: AdapterStore,
        report: Callable[[Report], None],
        disk: DiskTier | None = None,
    ) -> None:
        self._device = device
        self._dtype = DTYPES[dtype]
        self._store = store
        self._report = report
        self._disk = disk
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="loramix-merge")
        self._streams = local()
        self._jobs: LRUCache[int, Job] = LRUCache(_REMEMBERED)
        self._flights: dict[int, _Flight] = {}

    def begin(self, job: Job, rooms: Rooms, started: float) -> None:
        """Start merging into `rooms`; to be called on the engine's thread, `started` being when it took up the job."""
        self._jobs[job["lora_id"]] = job
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._device))
        begun = time.perf_counter()
        flight = _Flight(job, rooms, begun, ready, {"commit": begun - started})
        self._flights[job["lora_id"]] = flight
        self._threads.submit(self._run, flight)

    def drop(self, lora_id: int) -> None:
        """Have a merge end at its next phase, if it is under way; it is reported as ever."""
        if (flight := self._flights.get(lora_id)) is not None:
            flight.dropped = True

    def leave(self, lora_id: int) -> None:
        """Have that id's slot neither written nor read any more, once a merge that is under way has ended."""
        if (flight := self._flights.get(lora_id)) is not None:
            flight.ended.wait()
        if self._disk is not None:
            self._disk.leave(lora_id)

    def forget(self, digests: list[str]) -> dict[str, int]:
        """Free the memory of adapters that nobody will ask for; returns what all others take up, by tier."""
        self._store.forget(digests)
        return self._store.used_bytes()

    def rebuild(self, lora_id: int) -> LoraAdapter | None:
        """Merge a job of the past again, here and now, into memory of its own; None if it is not remembered."""
        job = self._jobs.get(lora_id)
        return None if job is None else self._merge_again(job)

    def warm_up(self, adapter: LoraAdapter, specs: list[MergeSpec], rooms: Rooms) -> None:
        """Merge each of `specs`, of copies of one adapter, so that no request waits for what a first merge has to do.

        Each is merged twice: on a GPU its kernels are compiled in the first merge, and captured as a graph in the second.
        Returns when all is done.
        """

        def run() -> None:
            with self._beside():
                for spec in (*specs, *specs):
                    merge_into({term.adapter: adapter for term in spec.terms}, spec, rooms)

        self._threads.submit(run).result()

    def _run(self, flight: _Flight) -> None:
        """One merge from beginning to end, on a helper thread. Nothing is raised: nobody would be there to catch it."""
        begin(None if flight.job["request_id"] is None else RequestFacts(flight.job["request_id"]))
        state: Literal["done", "failed", "dropped"] = "done"
        fault = None
        try:
            self._merge(flight)
        except _Dropped:
            state = "dropped"
        except Exception as error:  # noqa: BLE001  (whatever a merge raises is its requests' affair, not the engine's)
            state, fault = "failed", _fault(error)
        disk = self._disk if state == "done" and flight.disk != "hit" else None
        expected = disk is not None and disk.expect(flight.job, flight.seconds)
        del self._flights[flight.job["lora_id"]]
        flight.ended.set()
        self._report(
            Report(
                lora_id=flight.job["lora_id"], state=state, fault=fault, seconds=flight.seconds, tiers=flight.tiers,
                disk=flight.disk, used_bytes=self._store.used_bytes(),
            )
        )  # fmt: skip
        if disk is not None and expected:
            disk.write(flight.job, lambda: self._copy(flight, disk.whole))

    def _merge(self, flight: _Flight) -> None:
        flight.seconds["queue"] = time.perf_counter() - flight.begun
        flight.go_on()
        with self._beside():
            if self._disk is not None and self._disk.is_quicker(flight.job, self._store):
                self._restore(flight, self._disk)
            if flight.disk != "hit":
                self._merge_sources(flight)

    def _merge_sources(self, flight: _Flight) -> None:
        absent = 0 if self._disk is None else absent_bytes(flight.job, self._store)
        with self._store.acquire(_sources(flight.job)) as held:
            flight.sources, flight.tiers = held.adapters, held.tiers
            flight.seconds |= held.seconds
            flight.go_on()
            started = time.perf_counter()
            self._fill(flight, held.adapters, _spec(flight.job))
        flight.seconds["merge"] = time.perf_counter() - started  # the end of `acquire` has waited for the stream
        if self._disk is not None:
            self._disk.merged(flight.job, flight.seconds, absent)

    def _restore(self, flight: _Flight, disk: DiskTier) -> None:
        """Fill the slot from the disk cache, if it can be done; what the disk does is no reason for a merge to fail."""
        started = time.perf_counter()
        flight.disk = "miss"
        file = disk.file(flight.job)
        try:
            with self._store.acquire([file]) as held:
                flight.go_on()
                self._fill(flight, held.adapters, MergeSpec.create("cat", [Term(file.name)]))  # of one term: a copy
            if "disk" in held.tiers:
                disk.read(flight.job, held.seconds["load"])
            flight.disk = "hit"
        except (_Dropped, NotCachedError):
            pass  # the one is raised again below, the other was counted
        except Exception as error:  # noqa: BLE001  (whatever it is, the adapter can be merged)
            logger.warning("disk cache: %s could not be used: %s", file.entry, error)
        flight.seconds["disk"] = time.perf_counter() - started
        flight.go_on()

    def _fill(self, flight: _Flight, adapters: Mapping[str, LoraAdapter], spec: MergeSpec) -> None:
        """Merge into the slot, once what the engine had queued before is through."""
        if flight.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(flight.ready)
        merge_into(adapters, spec, flight.rooms)

    def _copy(self, flight: _Flight, whole: bool) -> LoraAdapter:
        """The merged adapter in host memory: from its slot if that holds it `whole`, else merged again once nothing else is."""
        if whole:
            merged = merged_ranks(_spec(flight.job), {name: ranks(adapter) for name, adapter in flight.sources.items()})
            with self._beside():
                return copy_of(flight.rooms, merged)
        while others := list(self._flights.values()):
            others[0].ended.wait()
        with self._beside():
            adapter = self._merge_again(flight.job)
        return adapter.to("cpu")

    def _merge_again(self, job: Job) -> LoraAdapter:
        with self._store.acquire(_sources(job)) as held:
            return merge(held.adapters, _spec(job), device=self._device, dtype=self._dtype)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Work on the calling thread's own CUDA stream, done when the block ends; decoding, on the engine's, does not wait."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            yield
            self._streams.own.synchronize()


def _sources(job: Job) -> list[SourceFile]:
    return [SourceFile(name, folder, digest) for name, _, folder, digest, _ in job["terms"]]


def _spec(job: Job) -> MergeSpec:
    return MergeSpec.create(job["method"], [Term.of(name, weight) for name, weight, *_ in job["terms"]], job["options"])


def _fault(error: Exception) -> Fault:
    """What went wrong, for the server to raise again."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Fault(kind=OUT_OF_MEMORY, message=message, param=None)
    if not isinstance(error, LoramixError):
        logger.error("a merge failed", exc_info=error)
        message = f"{type(error).__name__}: {message}"
    return Fault(kind=type(error).__name__, message=message, param=getattr(error, "param", None))
