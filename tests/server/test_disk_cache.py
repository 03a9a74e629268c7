"""The disk cache: disks that are full, read-only, slow or gone cost metrics, and nobody an answer."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from disk_harness import ENTRY_BYTES, KEYS, WEIGHTS, Cache, adapter_of, is_right, until

from merging import LoraAdapter, LoraModule
from server import disk_cache, disk_folder

MakeCache = Callable[..., Cache]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make_cache(path: Path) -> Iterator[MakeCache]:
    made = []

    def make(*args: Any, **options: Any) -> Cache:
        made.append(Cache(path, *args, **options))
        return made[-1]

    yield make
    for each in made:
        each.cache.close()


def test_what_is_written_is_read_and_counted(make_cache: MakeCache) -> None:
    cache = make_cache(2 * ENTRY_BYTES)
    assert cache.cache.read(KEYS[0]) is None
    cache.write(*KEYS[:3], KEYS[2])
    assert cache.cache.keys() == set(KEYS[1:3])
    assert is_right(KEYS[2], cache.cache.read(KEYS[2]))
    assert cache.count("writes_total", outcome="written") == 3
    assert cache.count("writes_total", outcome="present") == 1
    assert cache.count("reads_total", result="hit") == cache.count("reads_total", result="miss") == 1
    assert (cache.count("entries"), cache.count("bytes"), cache.count("evictions_total")) == (2, 2 * ENTRY_BYTES, 1)
    assert cache.count("seconds_count", operation="write") == 3
    assert cache.cache.remove(KEYS[2])
    assert cache.cache.read(KEYS[2]) is None


def test_a_read_counts_as_a_use(make_cache: MakeCache) -> None:
    cache = make_cache(2 * ENTRY_BYTES)
    cache.write(*KEYS[:2])
    cache.cache.read(KEYS[0])
    cache.write(KEYS[2])
    assert cache.cache.keys() == {KEYS[0], KEYS[2]}


def test_damage_is_counted_logged_and_mended(make_cache: MakeCache, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache()
    cache.write(*KEYS[:2])
    for key in KEYS[:2]:
        os.truncate(path / key / WEIGHTS, 100)
        assert cache.cache.read(key) is None
    assert cache.count("reads_total", result="corrupt") == cache.count("errors_total", operation="read", kind="corrupt") == 2
    assert len(caplog.records) == 1  # the second line of a kind within a minute is not written
    assert "corrupt" in caplog.text
    cache.write(KEYS[0])
    assert is_right(KEYS[0], cache.cache.read(KEYS[0]))


REFUSALS = [
    (errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EROFS, "read_only"), (errno.EACCES, "no_access"), (errno.EIO, "io"),
    (errno.EMFILE, "io"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "kind"), REFUSALS, ids=[errno.errorcode[number] for number, _ in REFUSALS])
def test_a_disk_that_refuses_costs_a_metric_and_a_line_a_minute(
    make_cache: MakeCache, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    number: int, kind: str,
) -> None:  # fmt: skip
    def refuse(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    cache = make_cache()
    cache.write(KEYS[0])
    monkeypatch.setattr(disk_folder, "write_entry", refuse)
    monkeypatch.setattr(disk_folder, "read_entry", refuse)
    monkeypatch.setattr(disk_folder.os, "utime", refuse)
    cache.write(KEYS[1], KEYS[2])
    assert cache.cache.read(KEYS[0]) is None
    assert cache.count("errors_total", operation="write", kind=kind) == cache.count("writes_total", outcome="error") == 2
    assert cache.count("errors_total", operation="read", kind=kind) == cache.count("reads_total", result="error") == 1
    assert len(caplog.records) == 1
    monkeypatch.setattr(disk_cache, "_QUIET", -1.0)
    monkeypatch.setattr(cache.cache, "_quiet_until", {})
    cache.cache.read(KEYS[0])
    cache.cache.read(KEYS[0])
    assert len(caplog.records) == 3
    monkeypatch.undo()
    cache.write(KEYS[1])
    assert all(is_right(key, cache.cache.read(key)) for key in KEYS[:2])  # nothing was lost
    assert not [file for folder in path.glob(".server-*") for file in folder.iterdir() if file.name != "lock"]


def test_an_entry_that_cannot_be_marked_as_used_is_served(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    cache.write(KEYS[0])

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(disk_folder.os, "utime", refuse)
    assert is_right(KEYS[0], cache.cache.read(KEYS[0]))
    assert cache.count("errors_total", operation="touch", kind="read_only") == 1


def test_an_adapter_that_cannot_be_saved_and_a_bug_leave_the_writer_alive(
    make_cache: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make_cache()
    cache.cache.write(KEYS[0], LoraAdapter({"m": LoraModule(torch.full((1, 2), torch.inf), torch.ones(2, 1))}))
    cache.cache.write(KEYS[1], None)  # type: ignore[arg-type]
    until(lambda: cache.writes() == 2)
    cache.write(KEYS[2])
    assert cache.count("errors_total", operation="write", kind="overflow") == 1
    assert cache.count("errors_total", operation="write", kind="bug") == 1
    assert "Traceback" in caplog.text
    assert cache.cache.keys() == {KEYS[2]}


def test_a_folder_deleted_while_in_use_is_made_anew(make_cache: MakeCache, path: Path) -> None:
    cache = make_cache()
    cache.write(KEYS[0])
    shutil.rmtree(path)
    assert cache.cache.read(KEYS[0]) is None
    assert cache.cache.keys() == frozenset()
    cache.write(KEYS[0])
    assert is_right(KEYS[0], cache.cache.read(KEYS[0]))


def test_a_file_in_the_place_of_the_folder_costs_a_metric(make_cache: MakeCache, path: Path) -> None:
    path.write_text("no folder")
    cache = make_cache()
    cache.write(KEYS[0])
    assert cache.cache.read(KEYS[0]) is None
    assert cache.cache.keys() == frozenset()
    assert cache.count("errors_total", operation="write", kind="io") == 1
    assert path.read_text() == "no folder"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Event]]:
    """Has a disk operation hang until the event that it returns is set."""
    events = []

    def hang(operation: str) -> Event:
        original, go_on = getattr(disk_folder, operation), Event()
        events.append(go_on)

        def wait(*args: Any) -> Any:
            assert go_on.wait(20)
            return original(*args)

        monkeypatch.setattr(disk_folder, operation, wait)
        return go_on

    yield hang
    for event in events:
        event.set()


def test_a_read_that_takes_too_long_is_given_up_and_none_is_tried_for_a_while(
    make_cache: MakeCache, hanging: Callable[[str], Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(read_seconds=0.05)
    cache.write(KEYS[0])
    go_on = hanging("read_entry")
    assert cache.cache.read(KEYS[0]) is None
    assert cache.count("errors_total", operation="read", kind="slow") == cache.count("reads_total", result="error") == 1
    go_on.set()
    assert cache.cache.read(KEYS[0]) is None
    assert cache.count("reads_total", result="paused") == 1
    monkeypatch.setattr(cache.cache, "_paused_until", 0.0)  # a while later
    monkeypatch.setattr(cache.cache, "_read_seconds", 10.0)
    assert is_right(KEYS[0], cache.cache.read(KEYS[0]))


def test_no_more_threads_hang_than_a_few(
    make_cache: MakeCache, hanging: Callable[[str], Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(read_seconds=0.02)
    cache.write(KEYS[0])
    go_on = hanging("read_entry")
    monkeypatch.setattr(disk_cache, "_PAUSE", 0.0)
    for _ in range(8):
        assert cache.cache.read(KEYS[0]) is None
    assert cache.cache._threads._value == 0
    go_on.set()
    until(lambda: cache.cache._threads._value == disk_cache._THREADS)
    monkeypatch.setattr(cache.cache, "_read_seconds", 10.0)
    assert is_right(KEYS[0], cache.cache.read(KEYS[0]))


def test_what_a_slow_disk_cannot_take_is_dropped_at_once(make_cache: MakeCache, hanging: Callable[[str], Event]) -> None:
    cache = make_cache()
    cache.write(KEYS[0])
    go_on = hanging("write_entry")
    for key in KEYS[1:]:
        cache.cache.write(key, adapter_of(key))
    assert cache.count("writes_total", outcome="dropped") >= len(KEYS) - 2 - disk_cache._WAITING
    assert is_right(KEYS[0], cache.cache.read(KEYS[0]))  # reads go on
    go_on.set()
    until(lambda: cache.writes() + cache.count("writes_total", outcome="dropped") == len(KEYS))
    written = cache.cache.keys()
    assert len(written) == cache.count("writes_total", outcome="written")
    assert all(is_right(key, cache.cache.read(key)) for key in written)


def test_closing_writes_what_is_waiting_and_takes_no_more(make_cache: MakeCache, path: Path) -> None:
    cache = make_cache()
    for key in KEYS[: disk_cache._WAITING]:
        cache.cache.write(key, adapter_of(key))
    cache.cache.close()
    assert not list(path.glob(".server-*"))
    assert all(is_right(key, cache.cache.read(key)) for key in KEYS[: disk_cache._WAITING])
    cache.cache.write(KEYS[-1], adapter_of(KEYS[-1]))
    assert cache.count("writes_total", outcome="dropped") == 1


def test_closing_does_not_wait_for_a_disk_that_hangs(make_cache: MakeCache, hanging: Callable[[str], Event]) -> None:
    cache = make_cache()
    hanging("write_entry")
    for key in KEYS:
        cache.cache.write(key, adapter_of(key))
    cache.cache.close(seconds=0.05)
    assert cache.cache._writer.is_alive()


REAL_DISK = '''
"""In a mount namespace of its own: a disk that is full, and one that is read-only. Prints what became of it as JSON."""
import json, os, subprocess, sys
from pathlib import Path
from disk_harness import KEYS, Cache, is_right

disk = Path(sys.argv[1])
mount = lambda *args: subprocess.run(["mount", *args, str(disk)], check=True)
mount("-t", "tmpfs", "-o", "size=128k", "tmpfs")
cache = Cache(disk / "cache")
cache.write(KEYS[0])
(disk / "others").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
cache.write(KEYS[1], KEYS[2])
full = [is_right(key, cache.cache.read(key)) for key in KEYS[:3]], cache.count("errors_total", operation="write", kind="full")
(disk / "others").unlink()
cache.write(KEYS[1])
cache.cache.close()
mount("-o", "remount,ro")
cache = Cache(disk / "cache")
cache.write(KEYS[2])
read_only = (
    [is_right(key, cache.cache.read(key)) for key in KEYS[:3]],
    cache.count("errors_total", operation="write", kind="read_only"),
    cache.count("errors_total", operation="touch", kind="read_only"),
)
print(json.dumps([full, read_only]))
'''


def test_disks_that_are_full_or_read_only_indeed(tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount a file system of their own")
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [*alone, sys.executable, "-c", REAL_DISK, tmp_path], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    full, read_only = json.loads(child.stdout)
    assert full == [[True, False, False], 2]
    assert read_only == [[True, True, False], 1, 2]
