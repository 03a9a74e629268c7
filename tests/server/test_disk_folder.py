"""The disk cache's folder: entries are whole PEFT folders, last over restarts, and leave in the order of their last use."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_harness import CONFIG, ENTRY_BYTES, KEYS, MANIFEST, PLENTY, WEIGHTS, adapter_of, filled, is_right
from harness import tiny_adapter
from safetensors.torch import load_file

from merging import load_adapter
from server import disk_folder
from server.disk_entry import write_entry
from server.disk_folder import CacheFolder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_an_entry_is_a_peft_folder_with_a_manifest_of_its_checksums(path: Path) -> None:
    filled(path, KEYS[:1])
    entry = path / KEYS[0]
    assert sorted(file.name for file in entry.iterdir()) == [CONFIG, WEIGHTS, MANIFEST]
    assert is_right(KEYS[0], load_adapter(entry))
    module, factors = "model.layers.0.q_proj", load_file(entry / WEIGHTS)
    assert torch.equal(factors[f"base_model.model.{module}.lora_A.weight"], adapter_of(KEYS[0]).modules[module].a)
    manifest = json.loads((entry / MANIFEST).read_text())
    assert manifest["key"] == KEYS[0]
    assert manifest["sha256"] == {name: hashlib.sha256((entry / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)}


def test_the_folder_is_made_for_its_user_alone_and_nothing_else_is_left_in_it(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "cache"
    folder = filled(path, KEYS[:2])
    assert path.stat().st_mode & 0o777 == 0o700
    folder.close()
    assert sorted(item.name for item in path.iterdir()) == sorted([".lock", *KEYS[:2]])


def test_a_server_that_starts_anew_finds_everything(path: Path) -> None:
    filled(path, KEYS[:3]).close()
    again = CacheFolder(path, PLENTY)
    assert again.keys() == set(KEYS[:3])
    assert all(is_right(key, again.read(key)) for key in KEYS[:3])
    assert again.read(KEYS[3]) is None
    assert again.publish(KEYS[0], adapter_of(KEYS[0])) is None  # it need not be written again


def test_before_the_folder_is_there_nothing_is_in_it(path: Path) -> None:
    folder = CacheFolder(path, PLENTY)
    assert folder.keys() == frozenset()
    assert folder.read(KEYS[0]) is None


def test_an_entry_that_is_removed_is_gone(path: Path) -> None:
    folder = filled(path, KEYS[:2])
    assert folder.remove(KEYS[0])
    assert not folder.remove(KEYS[0])
    assert folder.read(KEYS[0]) is None
    assert is_right(KEYS[1], folder.read(KEYS[1]))


def test_what_is_no_key_is_left_alone(path: Path) -> None:
    folder = filled(path, KEYS[:1])
    (path / "lost+found").mkdir()
    (path / "notes").write_text("mine")
    (path.parent / "outside").write_text("mine")
    for name in ("lost+found", "notes", "../outside", ".lock", "", KEYS[0].upper(), f"{KEYS[0]}/"):
        assert not folder.remove(name)
    filled(path, KEYS[1:4], most_bytes=ENTRY_BYTES).open()
    assert folder.keys() == {KEYS[3]}
    assert (path / "notes").read_text() == (path.parent / "outside").read_text() == "mine"
    assert (path / "lost+found").is_dir()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_not_used(path: Path, mode: int) -> None:
    folder = filled(path, KEYS[:1])
    path.chmod(mode)
    with pytest.raises(PermissionError, match="mode 700"):
        folder.read(KEYS[0])
    with pytest.raises(PermissionError, match="mode 700"):
        CacheFolder(path, PLENTY).open()


def test_entries_never_take_more_than_they_may_and_those_unused_for_longest_leave(path: Path) -> None:
    a, b, c, d, e = KEYS[:5]
    folder = filled(path, [a, b, c], most_bytes=3 * ENTRY_BYTES)
    folder.touch(a)
    usage = folder.publish(d, adapter_of(d))
    assert usage is not None
    assert (usage.entries, usage.nbytes, usage.evicted) == (3, 3 * ENTRY_BYTES, 1)
    assert folder.keys() == {a, c, d}
    other = CacheFolder(path, 3 * ENTRY_BYTES)  # another server, which sees the same uses
    other.touch(c)
    other.publish(e, adapter_of(e))
    assert folder.keys() == {c, d, e}
    assert all(is_right(key, folder.read(key)) for key in (c, d, e))


def test_room_is_made_before_an_entry_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(path, KEYS[:2], most_bytes=2 * ENTRY_BYTES)

    def look_and_write(*args: Any) -> int:
        assert folder.keys() == {KEYS[1]}
        return write_entry(*args)

    monkeypatch.setattr(disk_folder, "write_entry", look_and_write)
    usage = folder.publish(KEYS[2], adapter_of(KEYS[2]))
    assert usage is not None
    assert usage.evicted == 1
    assert folder.keys() == {KEYS[1], KEYS[2]}


def test_a_server_that_starts_with_a_lower_limit_keeps_what_was_used_last(path: Path) -> None:
    filled(path, KEYS[:4]).touch(KEYS[0])
    usage = CacheFolder(path, 2 * ENTRY_BYTES + 1).open()
    assert (usage.entries, usage.nbytes, usage.evicted) == (2, 2 * ENTRY_BYTES, 2)
    assert CacheFolder(path, PLENTY).keys() == {KEYS[0], KEYS[3]}


def test_an_entry_larger_than_the_cache_is_refused_and_costs_the_others_nothing(path: Path) -> None:
    folder, large = filled(path, KEYS[:1], most_bytes=2 * ENTRY_BYTES), tiny_adapter(40, 0)
    assert large.nbytes > 2 * ENTRY_BYTES
    with pytest.raises(OSError, match="larger than the whole cache") as raised:
        folder.publish(KEYS[1], large)
    assert raised.value.errno == errno.EFBIG
    assert folder.keys() == {KEYS[0]}


def test_a_clock_that_is_set_back_does_not_make_the_newest_the_oldest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = KEYS[:4]
    folder = filled(path, [a, b, c], most_bytes=3 * ENTRY_BYTES)
    monkeypatch.setattr(disk_folder.time, "time_ns", lambda: 1_000)
    folder.touch(a)
    folder.publish(d, adapter_of(d))
    assert folder.keys() == {a, c, d}
    restarted = CacheFolder(path, 3 * ENTRY_BYTES)
    restarted.open()
    restarted.touch(c)
    restarted.publish(b, adapter_of(b))
    assert folder.keys() == {b, c, d}
