"""The rule by which a merged adapter is read from the disk cache instead of merged, or written there: whatever is quicker."""

from collections import defaultdict, deque
from threading import Lock

_REMEMBERED = 8  # times of a kind; the shortest of them counts, being that of the work alone


class Estimates:
    """What merges and reads have taken so far in this worker, and what that says of the next; any thread may ask and tell."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._merges: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._loads: deque[float] = deque(maxlen=_REMEMBERED)  # seconds a byte
        self._reads: deque[float] = deque(maxlen=_REMEMBERED)

    def merged(self, method: str, terms: int, seconds: float) -> None:
        """A merge of so many adapters took so long, reading them from disk apart."""
        with self._lock:
            self._merges[method, terms].append(seconds)

    def loaded(self, nbytes: int, seconds: float) -> None:
        """Source adapters were read from disk."""
        with self._lock:
            self._loads.append(seconds / nbytes)

    def read(self, nbytes: int, seconds: float) -> None:
        """An entry was read from the disk cache."""
        with self._lock:
            self._reads.append(seconds / nbytes)

    def prefer_entry(self, method: str, terms: int, source_bytes: int, entry_bytes: int) -> bool:
        """Whether to ask the disk cache rather than merge.

        As long as no merge of this kind is known, or nothing has been read, only where there are sources to be read.

        Args:
            source_bytes: of the sources that are not in memory.
            entry_bytes: of the merged adapter; 0 if it is in memory.
        """
        with self._lock:
            merge = self._merges.get((method, terms))
            load, read = self._loads or self._reads, self._reads or self._loads
            if not (merge and read):
                return source_bytes > 0
            return entry_bytes * min(read) < source_bytes * min(load) + min(merge)

    def is_worth_writing(self, entry_bytes: int, build_seconds: float) -> bool:
        """Whether reading the entry would have been quicker than the build was."""
        with self._lock:
            read = self._reads or self._loads
            return not read or entry_bytes * min(read) < build_seconds
