"""Locks on files, as servers that share a folder need them.

They are flock's: the kernel lets go of them however a process ends, NFS included, and, unlike fcntl's, two caches of one
process keep each other out as well, and closing another descriptor of the file does not let go.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock for the duration of the block, as soon as nobody else does. Raises OSError."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def hold(file: Path) -> int:
    """Make the file and hold its lock until the descriptor that is returned is closed, or the process ends. Raises OSError."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def is_held(file: Path) -> bool:
    """Whether anybody holds the lock; nobody does where there is no such file. Raises OSError."""
    try:
        lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
