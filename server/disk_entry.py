"""An entry of the disk cache: a PEFT folder with a manifest of its checksums.

A manifest has one right content for given files, so it is compared and never parsed: nothing that it claims can lead
anywhere. It tells damage and mix-ups from what was written, but not who wrote it: that is for the folder's mode to say.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from merging import AdapterError, LoraAdapter, save_adapter
from merging.peft_folder import CONFIG, WEIGHTS, parse_adapter

MANIFEST = "manifest.json"
_FORMAT = 1
_FILES = (CONFIG, WEIGHTS)


class CorruptEntryError(Exception):
    """An entry is not what was written under its key. Stays inside the disk cache: the adapter is merged again instead."""


def write_entry(folder: Path, key: str, adapter: LoraAdapter) -> int:
    """Write the new folder `folder`; when this returns, all of it is on the disk. Returns its size in bytes.

    Raises:
        OutputError: see save_adapter.
        OSError: if the disk refuses.
    """
    save_adapter(adapter, folder)
    sums = {}
    for name in _FILES:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    with open(folder / MANIFEST, "xb") as file:
        file.write(_manifest(key, sums))
        file.flush()
        os.fsync(file.fileno())
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
    return sum((folder / name).stat().st_size for name in (*_FILES, MANIFEST))


def read_entry(entry: int, key: str, most_bytes: int) -> LoraAdapter:
    """Read and check the entry of `key` in the open folder `entry`.

    Every file is open before any is read, so the entry may be evicted meanwhile.

    Raises:
        CorruptEntryError: naming what is wrong.
        OSError: if the disk refuses.
    """
    names = {*_FILES, MANIFEST}
    if os.fstat(entry).st_uid != os.geteuid():
        raise CorruptEntryError("it belongs to another user")
    if (found := set(os.listdir(entry))) != names:
        raise CorruptEntryError(f"it holds {sorted(found)} instead of {sorted(names)}")
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open(entry, name)) for name in names}
        if sum(os.fstat(file.fileno()).st_size for file in files.values()) > most_bytes:
            raise CorruptEntryError("it is larger than the whole cache may be")
        contents = {name: _read(file) for name, file in files.items()}
    if contents[MANIFEST] != _manifest(key, {name: hashlib.sha256(contents[name]).hexdigest() for name in _FILES}):
        raise CorruptEntryError(f"{MANIFEST} is not that of this key and these files")
    try:
        return parse_adapter(contents[CONFIG], contents[WEIGHTS]).to("cpu")
    except AdapterError as error:
        raise CorruptEntryError(str(error)) from error


def _manifest(key: str, sums: Mapping[str, str]) -> bytes:
    return (json.dumps({"format": _FORMAT, "key": key, "sha256": sums}, indent=2, sort_keys=True) + "\n").encode()


def _open(entry: int, name: str) -> BinaryIO:
    try:  # O_NONBLOCK: opening a FIFO would wait for somebody to write to it
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=entry)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # none, a symbolic link, a socket
            raise CorruptEntryError(f"{name} is no file ({error.strerror})") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise CorruptEntryError(f"{name} is no file of this user")
    return open(descriptor, "rb")


def _read(file: BinaryIO) -> bytes:
    with file:
        return file.read()
