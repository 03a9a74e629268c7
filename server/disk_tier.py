"""The disk tier as the merger sees it: when to ask the disk cache for a merged adapter, and which ones to give it."""

import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from merging import LoraAdapter, LoramixError, LoraModule, Rooms
from merging.adapter import bits
from server.disk_cache import DiskCache
from server.disk_metrics import DiskMetrics
from server.disk_rule import Estimates
from server.job import Job
from server.store import AdapterStore

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own


class NotCachedError(LoramixError):
    """The disk cache has no such entry, or could not read it in time. Stays in the worker: the adapter is merged instead."""


class CachedFile(NamedTuple):
    """A merged adapter in the disk cache, to be read as a source adapter is: its name in the merge, its key, where it is."""

    name: str
    digest: str
    entry: str
    cache: DiskCache

    def read(self) -> LoraAdapter:
        """The adapter, on the CPU; raises NotCachedError."""
        adapter = self.cache.read(self.entry)
        if adapter is None:
            raise NotCachedError(self.entry)
        adapter.__dict__["digest"] = self.digest
        return adapter


class DiskTier:
    """What a worker keeps on disk.

    Args:
        device: that merges here. Entries are told apart by it and by torch's version: only with both alike do equal keys
            mean equal bytes, so that it never matters which worker of a server merges and which one reads.
        writes: whether this worker writes entries; all read them.
        whole: whether slots here hold whole factors, so that entries can be copied from there.
    """

    def __init__(self, cache: DiskCache, metrics: DiskMetrics, device: torch.device, *, writes: bool, whole: bool) -> None:
        self.whole = whole
        self._cache = cache
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._maker = re.sub(r"[^0-9a-z]+", "-", f"{name} torch {torch.__version__}".lower())
        self._writes = writes
        self._estimates = Estimates()
        self._keeper = _Keeper(cache, metrics)

    def file(self, job: Job) -> CachedFile:
        """What a job asks for, as the disk cache may have it."""
        return CachedFile("merged", job["key"], self._entry(job), self._cache)

    def is_quicker(self, job: Job, store: AdapterStore) -> bool:
        """Whether to ask for it before merging."""
        entry_bytes = 0 if store.has(job["key"]) else job["nbytes"]
        return self._estimates.prefer_entry(job["method"], len(job["terms"]), absent_bytes(job, store), entry_bytes)

    def read(self, job: Job, seconds: float) -> None:
        """Note that its entry has been read, and how long that took."""
        self._estimates.read(job["nbytes"], seconds)

    def merged(self, job: Job, seconds: Mapping[str, float], loaded_bytes: int) -> None:
        """Note that it has been merged, and how long that took by phase.

        Args:
            loaded_bytes: of the sources that had to be read.
        """
        if loaded_bytes:
            self._estimates.loaded(loaded_bytes, seconds["load"])
        self._estimates.merged(job["method"], len(job["terms"]), seconds["copy"] + seconds["merge"])

    def expect(self, job: Job, seconds: Mapping[str, float]) -> bool:
        """Whether a job that has been merged will be written; to be asked before anybody can know that it has been merged."""
        build_seconds = seconds["load"] + seconds["copy"] + seconds["merge"]
        if not self._writes or not self._estimates.is_worth_writing(job["nbytes"], build_seconds):
            return False
        self._keeper.expect(job["lora_id"], self._entry(job))
        return True

    def write(self, job: Job, copy: Callable[[], LoraAdapter]) -> None:
        """Have an expected job written; `copy`, which makes a copy of its own in host memory, is called on another thread."""
        self._keeper.keep(job["lora_id"], copy)

    def leave(self, lora_id: int) -> None:
        """To be called before anybody else writes where a job was merged to: copies that are not complete do not count."""
        self._keeper.leave(lora_id)

    def _entry(self, job: Job) -> str:
        return f"{job['key']}.{self._maker}"


class _Keeper:
    """Copies merged adapters for the disk cache, one after another, on a thread for which nobody waits.

    What is copied lies in a slot that the server may give away at any moment. The copy goes on then, of whatever is there, and
    is thrown away at its end.
    """

    def __init__(self, cache: DiskCache, metrics: DiskMetrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loramix-keep")
        self._staying: dict[int, str] = {}  # entries by the id whose slot they are in

    def expect(self, lora_id: int, entry: str) -> None:
        self._staying[lora_id] = entry

    def keep(self, lora_id: int, copy: Callable[[], LoraAdapter]) -> None:
        self._thread.submit(self._keep, lora_id, copy)

    def leave(self, lora_id: int) -> None:
        self._staying.pop(lora_id, None)

    def _keep(self, lora_id: int, copy: Callable[[], LoraAdapter]) -> None:
        adapter = None
        if lora_id in self._staying:
            try:
                adapter = copy()
            except Exception:
                self._metrics.errors.labels(operation="copy", kind="bug").inc()
                logger.exception("a merged adapter could not be copied for the disk cache")
        entry = self._staying.pop(lora_id, None)
        if entry is None:
            self._metrics.writes.labels(outcome="left").inc()
        elif adapter is not None:
            self._cache.write(entry, adapter)


def absent_bytes(job: Job, store: AdapterStore) -> int:
    """Bytes of a job's sources that are not in memory."""
    return sum(nbytes for _, _, _, digest, nbytes in job["terms"] if not store.has(digest))


def copy_of(rooms: Rooms, ranks: Mapping[str, int]) -> LoraAdapter:
    """A copy in host memory of what has been merged into rooms of whole factors; of each module that many units."""
    return LoraAdapter(
        {
            name: LoraModule(_copied(rooms[name].a_KI)[:rank], _copied(rooms[name].b_OK)[:, :rank])
            for name, rank in ranks.items()
        }
    )


def _copied(factor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, made in one piece, so that the device need not gather it first."""
    return factor.cpu() if factor.is_cuda else torch.from_numpy(bits(factor).copy()).view(factor.dtype)
