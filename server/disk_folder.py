"""The folder of the disk cache, which any number of servers share:

    <key>.<maker>/     an entry (see disk_entry.py); the mtime of its manifest says when it was last used
    .server-<random>/  what one server is writing or deleting, and `lock`, which it holds for as long as it lives
    .lock              held while room is made and an entry put in place; not while one is written, read or deleted

The folder is its own index: servers have nothing to keep in step, and nothing to rebuild when they restart.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from threading import Lock

from merging import LoraAdapter
from server.disk_entry import MANIFEST, CorruptEntryError, read_entry, write_entry
from server.disk_locks import hold, is_held, locked

_KEY = re.compile(r"[0-9a-f]{64}\.[0-9a-z-]+")  # content key, and what the bytes were made on


@dataclass(frozen=True)
class Usage:
    """What the folder holds, entries and their bytes, and how many entries have just been evicted."""

    entries: int
    nbytes: int
    evicted: int


@dataclass(frozen=True, order=True)
class _Listed:
    """An entry in a list; those last used earlier come first."""

    used_ns: int
    key: str
    nbytes: int


class CacheFolder:
    """Entries by key. They never take more than `most_bytes`: for a new one, those unused for longest leave.

    Servers that write at the same time need room for an entry each beyond that. Any thread may call any method; all may
    wait for the disk, and raise OSError where it refuses.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path = path
        self._lock = path / ".lock"
        self._most_bytes = most_bytes
        self._opening = Lock()
        self._own: tuple[Path, int] | None = None  # this server's folder, and the descriptor of its lock
        self._latest_ns = 0  # the latest use of any entry that this server knows of

    def open(self) -> Usage:
        """Make the folder if need be, and clear it of what crashed servers have left and of what is over the limit."""
        return self._clear(0)

    def keys(self) -> frozenset[str]:
        """The keys of all entries, unchecked."""
        try:
            return frozenset(name for name in os.listdir(self._path) if _KEY.fullmatch(name))
        except FileNotFoundError:
            return frozenset()

    def read(self, key: str) -> LoraAdapter | None:
        """The entry of `key`, if there is one.

        Raises:
            CorruptEntryError: for one that is not what was written; it is gone then.
        """
        try:
            entry = os.open(self._place(key), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            self.remove(key)
            raise CorruptEntryError("it is no folder") from error
        try:
            self._check_private()
            return read_entry(entry, key, self._most_bytes)
        except (CorruptEntryError, OSError) as error:
            if not self._is_at(entry, key):
                return None  # it was evicted before all of its files were open
            if isinstance(error, CorruptEntryError):
                self.remove(key)
            raise
        finally:
            os.close(entry)

    def touch(self, key: str) -> None:
        """Note that the entry of `key` is used now, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            self._stamp(self._place(key))

    def publish(self, key: str, adapter: LoraAdapter) -> Usage | None:
        """Make `adapter` the entry of `key`; None if there is one already.

        Raises:
            OutputError: see save_adapter.
        """
        place = self._place(key)
        if os.path.lexists(place):
            return None
        before = self._clear(adapter.nbytes)
        self._check_space(adapter.nbytes)
        with self._scratch() as scratch:
            made = scratch / key
            nbytes = write_entry(made, key, adapter)
            with locked(self._lock):
                if os.path.lexists(place):  # another server was faster
                    return None
                usage = self._make_room(nbytes, scratch)  # others may have taken it meanwhile
                self._stamp(made)
                made.rename(place)
        return replace(usage, evicted=before.evicted + usage.evicted)

    def remove(self, key: str) -> bool:
        """Remove the entry of `key`, whatever it is; whether there was one. Takes any text for a key."""
        if not _KEY.fullmatch(key):
            return False
        with self._scratch() as scratch:
            try:
                self._place(key).rename(scratch / key)
            except FileNotFoundError:
                return False
        return True

    def close(self) -> None:
        """Leave the folder to the others."""
        with self._opening:
            self._leave()

    def _place(self, key: str) -> Path:
        assert _KEY.fullmatch(key), key
        return self._path / key

    def _check_private(self) -> None:
        """Entries are trusted, so nobody else may be able to make any."""
        status = self._path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, "others may write there; make it yours with mode 700", str(self._path))

    def _check_space(self, nbytes: int) -> None:
        """So that a full disk is not written to in vain again and again."""
        disk = os.statvfs(self._path)
        if nbytes > disk.f_bavail * disk.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def _is_at(self, entry: int, key: str) -> bool:
        """Whether the open folder `entry` is still the entry of `key`."""
        try:
            return os.path.samestat(os.fstat(entry), self._place(key).lstat())
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for the duration of the block; what is in it at the end is deleted."""
        with self._opening:
            if self._own is None or not self._own[0].exists():
                self._own = self._enter()
            own, _ = self._own
        with TemporaryDirectory(dir=own) as scratch:
            yield Path(scratch)

    def _enter(self) -> tuple[Path, int]:
        """Make a folder of this server's own, and lock it."""
        self._leave()
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_private()
        with locked(self._lock):  # others would take it for one that a crashed server left, until its own lock is held
            folder = Path(mkdtemp(prefix=".server-", dir=self._path))
            return folder, hold(folder / "lock")

    def _leave(self) -> None:
        if self._own is not None:
            folder, lock = self._own
            self._own = None
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def _clear(self, nbytes: int) -> Usage:
        with self._scratch() as scratch, locked(self._lock):
            return self._make_room(nbytes, scratch)

    def _make_room(self, nbytes: int, scratch: Path) -> Usage:
        """Move to `scratch` what crashed servers have left, and entries until `nbytes` more fit. Needs the folder's lock.

        Returns what the folder will hold with the new entry.
        """
        if nbytes > self._most_bytes:
            raise OSError(errno.EFBIG, f"an entry of {nbytes} bytes is larger than the whole cache may be", str(self._path))
        for folder in self._path.glob(".server-*"):
            if not is_held(folder / "lock"):
                folder.rename(scratch / folder.name)
        entries = self._list()
        total, evicted = nbytes + sum(entry.nbytes for entry in entries), 0
        while total > self._most_bytes:
            victim = entries[evicted]
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                self._place(victim.key).rename(scratch / victim.key)
            total -= victim.nbytes
            evicted += 1
        return Usage(len(entries) - evicted + (nbytes > 0), total, evicted)

    def _list(self) -> list[_Listed]:
        with os.scandir(self._path) as items:
            entries = sorted(_measured(item) for item in items if _KEY.fullmatch(item.name))
        self._latest_ns = max([self._latest_ns, *(entry.used_ns for entry in entries)])
        return entries

    def _stamp(self, entry: Path) -> None:
        """Mark as used last: after all uses that are known, even where the clock has been set back."""
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        os.utime(entry / MANIFEST, ns=(self._latest_ns, self._latest_ns), follow_symlinks=False)


def _measured(item: os.DirEntry[str]) -> _Listed:
    """An entry's last use and size; what is no folder with a manifest was never used, and leaves first."""
    files: dict[str, os.stat_result] = {}
    if item.is_dir(follow_symlinks=False):
        with contextlib.suppress(OSError), os.scandir(item) as inside:
            files = {file.name: file.stat(follow_symlinks=False) for file in inside}
    used_ns = files[MANIFEST].st_mtime_ns if MANIFEST in files else 0
    return _Listed(used_ns, item.name, sum(file.st_size for file in files.values()))
