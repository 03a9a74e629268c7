"""The merger: builds merged adapters on helper threads inside the worker, beside the running engine.

Knows merging and threads, not vLLM. The engine's thread calls `begin`, `poll` and `drop`, which never block.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypedDict

import torch
from cachetools import LRUCache

from merging import DTYPES, AdapterError, LoraAdapter, MergeSpec, Term, load_adapter, merge

_THREADS = 2  # merges at a time: one computes while another reads
_REMEMBERED = 4096  # jobs that can be built again without asking the server


class Job(TypedDict):
    """A recipe as it crosses to the worker's process, in plain values.

    terms: [name, weight (as Term.of takes it), folder, digest] each.
    """

    lora_id: int
    method: str
    options: dict[str, Any]
    terms: list[tuple[str, float | dict[str, float], str, str]]


@dataclass(frozen=True)
class Built:
    """A merged adapter on the worker's device, with the seconds that each phase took."""

    adapter: LoraAdapter
    seconds: dict[str, float]


class Merger:
    """Merges jobs on `device` into `dtype`.

    Args:
        host_bytes: source adapters kept in host memory; the least recently used leave first.
    """

    def __init__(self, device: torch.device, dtype: str, host_bytes: int) -> None:
        self._device = device
        self._dtype = DTYPES[dtype]
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="loramix-merge")
        self._sources: LRUCache[str, LoraAdapter] = LRUCache(host_bytes, getsizeof=lambda adapter: adapter.nbytes)
        self._sources_lock = Lock()
        self._jobs: LRUCache[int, Job] = LRUCache(_REMEMBERED)
        self._running: dict[int, Future[Built]] = {}

    def begin(self, job: Job) -> None:
        """Start merging; a job that runs already is left alone."""
        self._jobs[job["lora_id"]] = job
        if job["lora_id"] not in self._running:
            self._running[job["lora_id"]] = self._threads.submit(self.build, job)

    def poll(self, lora_id: int) -> Built | None:
        """The merged adapter of a begun job once it is done, None before. Raises what the merge raised."""
        running = self._running[lora_id]
        if not running.done():
            return None
        built = running.result()
        if self._device.type == "cuda":  # its memory must outlive what the caller's stream does with it
            for stack in built.adapter.stacks:
                stack.a_LRI.record_stream(torch.cuda.current_stream(self._device))
                stack.b_LRO.record_stream(torch.cuda.current_stream(self._device))
        return built

    def drop(self, lora_id: int) -> None:
        """Let go of a job's result, done or not."""
        if (running := self._running.pop(lora_id, None)) is not None:
            running.cancel()

    def rebuild(self, lora_id: int) -> LoraAdapter | None:
        """Merge a job of the past again, here and now; None if it is not remembered."""
        job = self._jobs.get(lora_id)
        return None if job is None else self.build(job).adapter

    def build(self, job: Job) -> Built:
        """Read the sources and merge them, on the calling thread."""
        started = time.perf_counter()
        sources = {name: self._source(name, Path(folder), digest) for name, _, folder, digest in job["terms"]}
        loaded = time.perf_counter()
        terms = [Term.of(name, weight) for name, weight, _, _ in job["terms"]]
        spec = MergeSpec.create(job["method"], terms, job["options"])
        with _beside(self._device):
            merged = merge(sources, spec, device=self._device, dtype=self._dtype)
        return Built(merged, {"load": loaded - started, "merge": time.perf_counter() - loaded})

    def _source(self, name: str, folder: Path, digest: str) -> LoraAdapter:
        with self._sources_lock:
            adapter = self._sources.get(digest)
        if adapter is not None:
            return adapter
        adapter = load_adapter(folder)
        if adapter.digest != digest:
            raise AdapterError(
                f"adapter {name!r} in {folder} has changed since it was checked; restart the server to serve the new version"
            )
        with self._sources_lock, contextlib.suppress(ValueError):  # larger than the whole cache: used once
            self._sources[digest] = adapter
        return adapter


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own, done when the block ends, so that decoding on the main stream does not wait."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
