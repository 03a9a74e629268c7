"""Damaged and hostile entries of the disk cache: never served, removed, and written anew."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_harness import CONFIG, KEYS, MANIFEST, PLENTY, WEIGHTS, adapter_of, filled, is_right
from reference.weights_file import header_of, with_header

from server import disk_entry
from server.disk_entry import CorruptEntryError

Damage = Callable[[Path], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def flip(name: str) -> Damage:
    def do(entry: Path) -> None:
        content = bytearray((entry / name).read_bytes())
        random_ = random.Random(name)
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        (entry / name).write_bytes(content)

    return do


def cut(name: str) -> Damage:
    return lambda entry: os.truncate(entry / name, (entry / name).stat().st_size // 2)


def missing(name: str) -> Damage:
    return lambda entry: (entry / name).unlink()


def instead(name: str, make: Callable[[Path], None]) -> Damage:
    """Put something else where a file was."""

    def do(entry: Path) -> None:
        (entry / name).rename(entry.parent / "aside")
        make(entry / name)

    return do


def a_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(place.parent):
        made.bind(place.name)


def manifest(content: Any) -> Damage:
    return lambda entry: (entry / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))


def swap_weights(entry: Path) -> None:
    shutil.copy(entry.parent / KEYS[1] / WEIGHTS, entry / WEIGHTS)


def swap_entries(entry: Path) -> None:
    shutil.rmtree(entry)
    shutil.copytree(entry.parent / KEYS[1], entry)


def link_to_neighbour(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.symlink_to(entry.parent / KEYS[1], target_is_directory=True)


def a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("no folder")


def other_owner(entry: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(entry / CONFIG, 12345, 12345)


DAMAGES: dict[str, Damage] = {
    **{f"{do.__name__} {name}": do(name) for do in (flip, cut, missing) for name in (CONFIG, WEIGHTS, MANIFEST)},
    **{f"empty {name}": instead(name, Path.touch) for name in (CONFIG, WEIGHTS, MANIFEST)},
    **{f"folder as {name}": instead(name, Path.mkdir) for name in (WEIGHTS, MANIFEST)},
    **{f"pipe as {name}": instead(name, os.mkfifo) for name in (WEIGHTS, MANIFEST)},
    "link as weights": instead(WEIGHTS, lambda place: place.symlink_to(place.parent.parent / "aside")),
    "socket as weights": instead(WEIGHTS, a_socket),
    "weights of another": swap_weights,
    "entry of another": swap_entries,
    "link to another": link_to_neighbour,
    "a file": a_file,
    "empty folder": lambda entry: [file.unlink() for file in entry.iterdir()] and None,
    "one file more": lambda entry: (entry / "more").write_text("more"),
    "another owner": other_owner,
    "manifest of paths": manifest({"format": 1, "key": KEYS[0], "sha256": {"../../outside": "0" * 64}}),
    "manifest without sums": manifest({"format": 1, "key": KEYS[0], "sha256": {}}),
    "manifest too deep": manifest("[" * 100_000),
    "manifest no text": lambda entry: (entry / MANIFEST).write_bytes(b"\xff\x00" * 500),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_never_served_but_removed_and_written_anew(path: Path, damage: Damage) -> None:
    folder = filled(path, KEYS[:2])
    damage(path / KEYS[0])
    with pytest.raises(CorruptEntryError):
        folder.read(KEYS[0])
    assert folder.keys() == {KEYS[1]}
    assert folder.read(KEYS[0]) is None
    assert folder.publish(KEYS[0], adapter_of(KEYS[0])) is not None
    assert all(is_right(key, folder.read(key)) for key in KEYS[:2])


def claim(**fields: Any) -> Callable[[bytes], bytes]:
    """Change what the header says of its first tensor."""

    def lie(content: bytes) -> bytes:
        header, data = header_of(content)
        name = next(name for name in header if name != "__metadata__")
        header[name] |= fields
        return with_header(json.dumps(header), data)

    return lie


def twice(content: bytes) -> bytes:
    """Name the first two tensors alike, with data for both."""
    header, data = header_of(content)
    first, second = [name for name in header if name != "__metadata__"][:2]
    return with_header(json.dumps(header).replace(json.dumps(second), json.dumps(first)), data)


@pytest.mark.parametrize(
    "lie",
    [
        claim(data_offsets=[0, 2**31]), claim(data_offsets=[-4, 4]), claim(data_offsets=[8, 0]), claim(shape=[2**40, 2**40]),
        claim(dtype="F64"), claim(dtype="I8"), claim(shape=[]), twice,
        lambda content: struct.pack("<Q", 2**62) + content[8:],
        lambda content: with_header("{}", b""), lambda content: b"", lambda content: content + b"more",
    ],
    ids="2GB negative backwards huge-shape float64 int8 scalar twice long-header no-tensors empty longer".split(),
)  # fmt: skip
def test_weights_that_lie_are_refused_even_under_a_right_manifest(path: Path, lie: Callable[[bytes], bytes]) -> None:
    folder = filled(path, KEYS[:2])
    weights = path / KEYS[0] / WEIGHTS
    weights.write_bytes(lie(weights.read_bytes()))
    sums = {name: hashlib.sha256((path / KEYS[0] / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)}
    (path / KEYS[0] / MANIFEST).write_bytes(disk_entry._manifest(KEYS[0], sums))
    with pytest.raises(CorruptEntryError, match=r"adapter_model|lora_A"):
        folder.read(KEYS[0])
    assert folder.keys() == {KEYS[1]}


def test_files_larger_than_the_whole_cache_are_not_even_read(path: Path) -> None:
    folder = filled(path, KEYS[:1])
    os.truncate(path / KEYS[0] / WEIGHTS, 2 * PLENTY)  # sparse: takes no room
    with pytest.raises(CorruptEntryError, match="larger than the whole cache"):
        folder.read(KEYS[0])
    assert folder.keys() == frozenset()


def test_random_damage_is_never_served(path: Path) -> None:
    folder = filled(path, KEYS[:1])
    whole = {name: (path / KEYS[0] / name).read_bytes() for name in (CONFIG, WEIGHTS, MANIFEST)}
    random_ = random.Random(0)
    for _ in range(100):
        name = random_.choice(list(whole))
        content = bytearray(whole[name])
        match random_.randrange(3):
            case 0:
                content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
            case 1:
                del content[random_.randrange(len(content)) :]
            case 2:
                content.insert(random_.randrange(len(content) + 1), random_.randrange(256))
        (path / KEYS[0] / name).write_bytes(content)
        with pytest.raises(CorruptEntryError):
            folder.read(KEYS[0])
        folder.publish(KEYS[0], adapter_of(KEYS[0]))
    assert is_right(KEYS[0], folder.read(KEYS[0]))
