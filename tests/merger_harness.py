"""What the tests of the merger share: a merger that tells what it reports, its jobs, and rooms with leftovers in them."""

import time
from pathlib import Path
from queue import SimpleQueue

import torch
from disk_harness import PLENTY, Cache, until
from harness import MODULES

from merging import LoraAdapter, MergeSpec, Room, Rooms, Term, load_adapter, merge
from server.disk_tier import DiskTier
from server.job import Job
from server.merger import Merger
from server.reports import Report
from server.store import AdapterStore

RANK = 16  # of the rooms
CPU = torch.device("cpu")


class Bench:
    """A merger, and what it reports."""

    def __init__(self, host_bytes: int = 1 << 20, disk: DiskTier | None = None) -> None:
        self.reports: SimpleQueue[Report] = SimpleQueue()
        self.merger = Merger(CPU, "bfloat16", AdapterStore(CPU, host_bytes, 0), self.reports.put, disk)

    def begin(self, job: Job, rooms: Rooms | None = None) -> Rooms:
        rooms = rooms or used_rooms()
        self.merger.begin(job, rooms, time.perf_counter())
        return rooms

    def next(self) -> Report:
        return self.reports.get(timeout=10)


class Worker(Bench):
    """A merger with a disk cache, which it asks and writes whatever the time of a tiny merge is."""

    def __init__(self, path: Path, most_bytes: int = PLENTY, *, whole: bool = True, writes: bool = True) -> None:
        self.disk = Cache(path, most_bytes)
        tier = DiskTier(self.disk.cache, self.disk.metrics, CPU, writes=writes, whole=whole)
        tier._estimates.prefer_entry = lambda *args: True  # type: ignore[method-assign]
        tier._estimates.is_worth_writing = lambda *args: True  # type: ignore[method-assign]
        self.tier = tier
        super().__init__(disk=tier)

    def build(self, job: Job) -> Rooms:
        """The slot once the merge is done and its entry, if one is due, written or given up."""
        rooms = self.begin(job)
        report = self.next()
        assert report["state"] == "done"
        self.last = report
        until(lambda: not self.tier._keeper._staying and self.disk.cache._queue.empty())
        return rooms

    def entries(self) -> dict[str, Path]:
        return {path.name.split(".")[0]: path for path in self.disk.path.glob("[0-9a-f]*")}

    def built(self, job: Job) -> Rooms:
        """As `build`, and its entry is there."""
        rooms = self.build(job)
        until(lambda: job["key"] in self.entries())
        return rooms


def used_rooms() -> Rooms:
    """Rooms for all modules with something of the last merge in them."""
    return Rooms(
        {
            name: Room(torch.full((RANK, d_in), 7.0).bfloat16(), torch.full((d_out, RANK), 7.0).bfloat16())
            for name, (d_out, d_in) in MODULES.items()
        }
    )


def job_of(folders: dict[str, Path], lora_id: int = 1, method: str = "cat", **weights: float | dict[str, float]) -> Job:
    adapters = {name: load_adapter(folders[name]) for name in weights}
    spec = MergeSpec.create(method, [Term.of(name, weight) for name, weight in weights.items()])
    key = spec.key({name: adapter.digest for name, adapter in adapters.items()}, "bfloat16")
    terms = [(name, weights[name], str(folders[name]), adapter.digest, adapter.nbytes) for name, adapter in adapters.items()]
    nbytes = sum(adapter.nbytes for adapter in adapters.values())
    return Job(lora_id=lora_id, key=key, nbytes=nbytes, method=method, request_id=None, options={}, terms=terms)


def offline(folders: dict[str, Path], method: str, *terms: Term) -> LoraAdapter:
    return merge({name: load_adapter(folder) for name, folder in folders.items()}, MergeSpec.create(method, terms))


def holds(rooms: Rooms, merged: LoraAdapter) -> bool:
    """Whether the rooms have the bytes of a merged adapter, and zeros elsewhere."""
    for name, room in rooms.items():
        a_KI, b_OK = torch.zeros_like(room.a_KI), torch.zeros_like(room.b_OK)
        if name in merged.modules:
            module = merged.modules[name]
            a_KI[: module.rank], b_OK[:, : module.rank] = module.a, module.b
        if not (torch.equal(room.a_KI, a_KI) and torch.equal(room.b_OK, b_OK)):
            return False
    return True
