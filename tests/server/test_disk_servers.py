"""Several servers on one folder of the disk cache: killed, writing, evicting and reading at the same time."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event as ProcessEvent
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

import pytest
from disk_harness import ENTRY_BYTES, KEYS, PLENTY, adapter_of, filled, is_right

from merging import LoraAdapter
from server import disk_entry, disk_folder
from server.disk_folder import CacheFolder

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "server.composer", "server.disk_cache"])  # what takes long to import


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextlib.contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    process = processes.Process(target=target, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def write_for_ever(path: Path, most_bytes: int, seed: int, begun: ProcessEvent) -> None:
    folder, random_ = CacheFolder(path, most_bytes), random.Random(seed)
    while True:
        key = random_.choice(KEYS)
        folder.publish(key, adapter_of(key))
        folder.remove(random_.choice(KEYS))
        begun.set()


def test_a_server_killed_at_any_moment_leaves_only_whole_entries_and_what_the_next_one_cleans_up(path: Path) -> None:
    random_, cut_short, read = random.Random(0), 0, 0
    for seed in range(50):
        begun = processes.Event()
        with running(write_for_ever, path, 4 * ENTRY_BYTES, seed, begun) as server:
            assert begun.wait(20)
            time.sleep(random_.uniform(0, 0.05))
            assert server.is_alive()
            os.kill(server.pid or 0, signal.SIGKILL)
        leftovers = [file for folder in path.glob(".server-*") for file in folder.iterdir() if file.name != "lock"]
        cut_short += bool(leftovers)
        folder = CacheFolder(path, 4 * ENTRY_BYTES)
        entries = folder.keys()
        assert all(is_right(key, folder.read(key)) for key in entries)
        read += len(entries)
        folder.open()
        assert len(list(path.glob(".server-*"))) == 1
        folder.close()
        assert {item.name for item in path.iterdir()} == {".lock", *entries}
    assert cut_short > 10  # most were killed while they wrote
    assert read > 50


def test_what_a_living_server_is_writing_is_not_taken_for_a_leftover(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = Event(), Event()

    def slowly(*args: Any) -> int:
        writing.set()
        assert go_on.wait(10)
        return disk_entry.write_entry(*args)

    monkeypatch.setattr(disk_folder, "write_entry", slowly)
    writer = Thread(target=filled, args=(path, KEYS[:1]))
    writer.start()
    assert writing.wait(10)
    CacheFolder(path, PLENTY).open()
    go_on.set()
    writer.join()
    assert is_right(KEYS[0], CacheFolder(path, PLENTY).read(KEYS[0]))


def write_all(path: Path, most_bytes: int, keys: list[str], rounds: int) -> None:
    folder = CacheFolder(path, most_bytes)
    for _ in range(rounds):
        for key in keys:
            folder.publish(key, adapter_of(key))
            folder.read(key)
            folder.touch(key)
    folder.close()


@pytest.mark.parametrize("keys", [KEYS[:1], KEYS[:3]], ids=["one key", "more keys than fit"])
def test_servers_that_write_and_evict_at_once_keep_entries_whole_and_within_the_limit(path: Path, keys: list[str]) -> None:
    most_bytes = 2 * ENTRY_BYTES
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(write_all, path, most_bytes, keys, 15)) for _ in range(3)]
        folder = CacheFolder(path, most_bytes)
        while any(server.is_alive() for server in servers):
            for key in keys:
                adapter = folder.read(key)  # raises nothing: evicted entries are missing, not damaged
                assert adapter is None or is_right(key, adapter)
            assert len(folder.keys()) <= 2
        assert [server.exitcode for server in servers] == [0, 0, 0]
    assert len(folder.keys()) == min(2, len(keys))
    assert {item.name for item in path.iterdir()} == {".lock", *folder.keys()}


def read_slowly(path: Path, reading: ProcessEvent, go_on: ProcessEvent) -> None:
    """Read an entry, with a wait between opening its files and reading them; exit status 0 if it came out right."""
    read = disk_entry._read

    def wait_and_read(file: BinaryIO) -> bytes:
        reading.set()
        assert go_on.wait(10)
        return read(file)

    disk_entry._read = wait_and_read
    sys.exit(not is_right(KEYS[0], CacheFolder(path, PLENTY).read(KEYS[0])))


def test_an_entry_that_another_server_evicts_while_it_is_read_is_read_to_its_end(path: Path) -> None:
    filled(path, KEYS[:1])
    reading, go_on = processes.Event(), processes.Event()
    with running(read_slowly, path, reading, go_on) as reader:
        assert reading.wait(20)
        filled(path, KEYS[1:2], most_bytes=ENTRY_BYTES)
        assert not (path / KEYS[0]).exists()
        go_on.set()
        reader.join(20)
        assert reader.exitcode == 0


def test_an_entry_evicted_before_its_files_are_open_is_missing_and_not_damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled(path, KEYS[:1])

    def evict_and_read(*args: Any) -> LoraAdapter:
        assert CacheFolder(path, PLENTY).remove(KEYS[0])
        return disk_entry.read_entry(*args)

    monkeypatch.setattr(disk_folder, "read_entry", evict_and_read)
    assert folder.read(KEYS[0]) is None
