"""The disk cache: merged adapters by content key, in a folder that servers share and that outlives them.

All it may ever do is save time. What is damaged is not served; a disk that is full, read-only, slow or gone costs a metric
and a line in the log, and a request the deadline of one read at most.
"""

import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import Full, Queue
from threading import Semaphore, Thread
from typing import TypeVar

from merging import LoraAdapter
from merging.errors import OutputError
from server.disk_entry import CorruptEntryError
from server.disk_folder import CacheFolder, Usage
from server.disk_metrics import DiskMetrics

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own

_WAITING = 4  # adapters that wait to be written; each takes up its size in host memory
_THREADS = 4  # that ask the disk at a time, those that were given up included
_PAUSE = 30.0  # seconds without reads after one that took too long
_QUIET = 60.0  # seconds between two lines in the log on one kind of trouble
_KINDS = {
    errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EFBIG: "too_large", errno.EROFS: "read_only",
    errno.EACCES: "no_access", errno.EPERM: "no_access",
}  # fmt: skip
_T = TypeVar("_T")


class DiskCache:
    """Merged adapters on disk; any thread may ask, and nothing is ever raised.

    One thread gets the folder ready and writes. Reads happen on threads that can be given up; after one that was, there are
    none for a while, lest every request should wait for a slow disk.

    Trouble is counted by kind: `full`, `too_large` (for the whole cache), `read_only`, `no_access`, `slow`, `corrupt`,
    `overflow` (values that the adapter's dtype cannot hold), `io` (whatever else a disk refuses) and `bug`.

    Args:
        folder: of the entries; made, for this user alone, if it is missing.
        most_bytes: of all entries.
        read_seconds: that anybody waits for the disk at most.
        changed: called after each look-up and each entry, on the thread that was about it, once it is counted.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        metrics: DiskMetrics,
        read_seconds: float = 2.0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = CacheFolder(folder, most_bytes)
        self._metrics = metrics
        self._read_seconds = read_seconds
        self._changed = changed
        self._threads = Semaphore(_THREADS)
        self._paused_until = 0.0
        self._quiet_until: dict[str, float] = {}
        self._closed = False
        self._queue: Queue[tuple[str, LoraAdapter] | None] = Queue(_WAITING)
        self._writer = Thread(target=self._write_all, name="loramix-disk", daemon=True)  # no exit waits for a disk
        self._writer.start()

    def read(self, key: str) -> LoraAdapter | None:
        """The adapter of `key`, on the CPU; None if it is not there, not whole, or not to be had in time."""
        started = time.monotonic()
        adapter, result = None, "paused"
        if started >= self._paused_until:
            try:
                adapter = self._in_time(lambda: self._read(key))
                result = "miss" if adapter is None else "hit"
            except Exception as error:  # noqa: BLE001  (the adapter can always be merged instead)
                kind = self._complain("read", error)
                result = "corrupt" if kind == "corrupt" else "error"
                if kind == "slow":
                    self._paused_until = time.monotonic() + _PAUSE
        self._metrics.reads.labels(result=result).inc()
        if adapter is not None:
            self._metrics.seconds.labels(operation="read").observe(time.monotonic() - started)
        self._changed()
        return adapter

    def write(self, key: str, adapter: LoraAdapter) -> None:
        """Have `adapter` written, in a while, unless too many are waiting.

        Its factors lie on the CPU, have scaling 1, and stay as they are from now on.
        """
        try:
            if self._closed:
                raise Full
            self._queue.put_nowait((key, adapter))
        except Full:
            self._metrics.writes.labels(outcome="dropped").inc()

    def remove(self, key: str) -> bool:
        """Remove the entry of `key`; whether there was one. One that is waiting to be written is written nevertheless."""
        return self._ask("remove", lambda: self._folder.remove(key), otherwise=False)

    def keys(self) -> frozenset[str]:
        """The keys of all entries, those of other servers included; unchecked."""
        return self._ask("list", self._folder.keys, otherwise=frozenset())

    def close(self, seconds: float = 5.0) -> None:
        """Write what is waiting, for `seconds` at most; what is not written then is lost, and the next server cleans up."""
        deadline = time.monotonic() + seconds
        self._closed = True
        try:
            self._queue.put(None, timeout=seconds)
        except Full:
            return
        self._writer.join(max(0.0, deadline - time.monotonic()))

    def _read(self, key: str) -> LoraAdapter | None:
        adapter = self._folder.read(key)
        if adapter is not None:
            try:
                self._folder.touch(key)
            except OSError as error:
                self._complain("touch", error)
        return adapter

    def _ask(self, operation: str, work: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return self._in_time(work)
        except Exception as error:  # noqa: BLE001  (nobody's request fails for the disk)
            self._complain(operation, error)
            return otherwise

    def _in_time(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises; TimeoutError if that takes too long, and it goes on by itself."""
        deadline = time.monotonic() + self._read_seconds
        if not self._threads.acquire(timeout=self._read_seconds):
            raise TimeoutError(f"{_THREADS} others have been waiting for the disk for {self._read_seconds:g} s")
        outcome = Future[_T]()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:  # noqa: BLE001  (raised by `result`)
                outcome.set_exception(error)
            finally:
                self._threads.release()

        Thread(target=run, name="loramix-disk-read", daemon=True).start()
        return outcome.result(max(0.0, deadline - time.monotonic()))

    def _write_all(self) -> None:
        """What the writing thread does."""
        try:
            self._show(self._folder.open())
        except Exception as error:  # noqa: BLE001  (writing tries again)
            self._complain("open", error)
        self._changed()
        while (job := self._queue.get()) is not None:
            self._write(*job)
            self._changed()
            del job  # nothing holds its memory while this waits for the next
        self._folder.close()

    def _write(self, key: str, adapter: LoraAdapter) -> None:
        started, usage = time.monotonic(), None
        try:
            usage = self._folder.publish(key, adapter)
            outcome = "present" if usage is None else "written"
        except Exception as error:  # noqa: BLE001  (nobody waits for it)
            self._complain("write", error)
            outcome = "error"
        if usage is not None:
            self._show(usage)
            self._metrics.seconds.labels(operation="write").observe(time.monotonic() - started)
        self._metrics.writes.labels(outcome=outcome).inc()

    def _show(self, usage: Usage) -> None:
        self._metrics.entries.set(usage.entries)
        self._metrics.nbytes.set(usage.nbytes)
        self._metrics.evictions.inc(usage.evicted)

    def _complain(self, operation: str, error: Exception) -> str:
        """Count an error, and log it unless one of its kind was logged a short while ago; returns its kind."""
        kind = _kind_of(error)
        self._metrics.errors.labels(operation=operation, kind=kind).inc()
        now = time.monotonic()
        if now >= self._quiet_until.get(kind, 0.0):
            self._quiet_until[kind] = now + _QUIET
            logger.warning(
                "disk cache: %s failed: %s: %s (%s; silent about more of these for %g s)",
                operation, type(error).__name__, error, kind, _QUIET, exc_info=error if kind == "bug" else None,
            )  # fmt: skip
        return kind


def _kind_of(error: Exception) -> str:
    match error:
        case CorruptEntryError():
            return "corrupt"
        case OutputError():
            return "overflow"
        case TimeoutError():
            return "slow"
        case OSError():
            return _KINDS.get(error.errno or 0, "io")
    return "bug"
