"""A folder that is damaged after it was checked: its users are told in one line, others are served,
and what is put back works."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import MODULES, tiny_adapter

from merging import AdapterError, LoraAdapter, save_adapter
from server.catalog import Catalog
from server.errors import body_of, status_of
from server.reader import SourceFile
from server.store import AdapterStore
from server.survey import survey

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Damage = Callable[[Path], None]


def instead_of_folder(make: Damage) -> Damage:
    """Put something else where the folder was; what it held is beside it, hidden."""

    def do(folder: Path) -> None:
        folder.rename(folder.parent / ".aside")
        make(folder)

    return do


def instead_of(name: str, make: Damage) -> Damage:
    def do(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return do


def link_to(target: str) -> Damage:
    return lambda place: place.symlink_to(target)


def loop(place: Path) -> None:
    place.symlink_to(place.parent / "other end")
    (place.parent / "other end").symlink_to(place)


def another_adapter(folder: Path) -> None:
    save_adapter(tiny_adapter(4, 99), folder, replace=True)


def one_bit(name: str) -> Damage:
    def do(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)

    return do


def cut(name: str, part: float) -> Damage:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * part))


def louder(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 8'))


def neighbours_file(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder.parent / "code" / name).read_bytes())


DAMAGES: dict[str, Damage] = {
    "deleted": shutil.rmtree,
    "emptied": lambda folder: [file.unlink() for file in folder.iterdir()] and None,
    "a file": instead_of_folder(lambda place: place.write_text("no folder") and None),
    "a pipe": instead_of_folder(os.mkfifo),
    "link to a file": instead_of_folder(link_to("/etc/hostname")),
    "link to nowhere": instead_of_folder(link_to("nowhere")),
    "link to itself": instead_of_folder(link_to("math")),
    "loop of links": instead_of_folder(loop),
    "link to the folder of all adapters": instead_of_folder(link_to(".")),
    "link to another adapter": instead_of_folder(link_to("code")),
    "link to an adapter outside": instead_of_folder(link_to("../outside/math")),
    "another adapter": another_adapter,
    **{f"{name} deleted": instead_of(name, lambda place: None) for name in (CONFIG, WEIGHTS)},
    **{f"{name} a pipe": instead_of(name, os.mkfifo) for name in (CONFIG, WEIGHTS)},
    **{f"{name} a folder": instead_of(name, Path.mkdir) for name in (CONFIG, WEIGHTS)},
    **{f"{name} that never ends": instead_of(name, link_to("/dev/zero")) for name in (CONFIG, WEIGHTS)},
    **{f"{name} linked to nowhere": instead_of(name, link_to("nowhere")) for name in (CONFIG, WEIGHTS)},
    **{f"{name} linked to itself": instead_of(name, link_to(name)) for name in (CONFIG, WEIGHTS)},
    **{f"{name} cut to {part}": cut(name, part) for name in (CONFIG, WEIGHTS) for part in (0, 0.3, 0.99)},
    "weights of another": neighbours_file(WEIGHTS),
    "weights linked to those of another": instead_of(WEIGHTS, link_to(f"../code/{WEIGHTS}")),
    "weights linked to those of one outside": instead_of(WEIGHTS, link_to(f"../../outside/math/{WEIGHTS}")),
    "one bit of the weights": one_bit(WEIGHTS),
    "another scaling": louder,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("math", "code")):
        save_adapter(tiny_adapter(4, seed), tmp_path / "adapters" / name)
    save_adapter(tiny_adapter(4, 7), tmp_path / "outside" / "math")
    return tmp_path / "adapters"


@pytest.fixture
def sources(root: Path) -> dict[str, SourceFile]:
    """As the worker gets them of a catalog."""
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    for name in ("math", "code"):
        catalog.add(name, root / name)
    return {name: SourceFile(name, str(e.source.path), e.source.digest) for name, e in catalog.entries.items()}


def store() -> AdapterStore:
    return AdapterStore(torch.device("cpu"), 2**20, 0)


def held(store: AdapterStore, *wanted: SourceFile) -> list[str]:
    """The digests, made anew, of what a merge gets."""
    with store.acquire(wanted) as got:
        return [LoraAdapter(dict(adapter.modules), adapter.base_model).digest for adapter in got.adapters.values()]


def refusal(error: AdapterError, folder: str) -> None:
    """That a client is told in one line which folder it is and what to do."""
    message = body_of(error)["error"]["message"]
    assert status_of(error) == 400
    assert message.isprintable()
    assert folder in message
    assert any(remedy in message for remedy in ("check the path", "copy it", "name a folder", "restart the server"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_between_check_and_first_use_fails_its_users_alone_until_it_is_mended(
    root: Path, sources: dict[str, SourceFile], damage: Damage
) -> None:
    math, code = sources["math"], sources["code"]
    shutil.copytree(root / "math", root.parent / "whole")
    shared = store()
    damage(root / "math")
    for wanted in ([math], [code, math]):
        with pytest.raises(AdapterError) as raised:
            held(shared, *wanted)
        refusal(raised.value, math.folder)
    assert held(shared, code) == [code.digest]
    if (root / "math").is_dir() and not (root / "math").is_symlink():
        shutil.rmtree(root / "math")
    else:
        (root / "math").unlink(missing_ok=True)
    shutil.copytree(root.parent / "whole", root / "math")
    assert held(shared, math, code) == [math.digest, code.digest]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_after_the_first_use_is_not_even_noticed_while_the_adapter_is_in_memory(
    root: Path, sources: dict[str, SourceFile], damage: Damage
) -> None:
    shared = store()
    assert held(shared, sources["math"]) == [sources["math"].digest]
    damage(root / "math")
    assert held(shared, sources["math"]) == [sources["math"].digest]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_folder_in_any_state_is_surveyed_or_refused(root: Path, damage: Damage) -> None:
    """What the start makes of it. Links are followed, so some of these are adapters; none is what was there before."""
    before = survey(root / "math")
    damage(root / "math")
    try:
        found = survey(root / "math").digest
    except AdapterError as error:
        found = str(error)
    assert found != before.digest
    assert len(found) == len(before.digest) or str(root / "math") in found


def test_the_same_content_by_another_way_is_served(root: Path, sources: dict[str, SourceFile]) -> None:
    """The content decides, not the file: a link to a copy is as good."""
    shutil.copytree(root / "math", root.parent / "copy")
    shutil.rmtree(root / "math")
    (root / "math").symlink_to(root.parent / "copy")
    assert held(store(), sources["math"]) == [sources["math"].digest]


def test_random_bytes_changed_in_a_file_are_the_same_adapter_or_refused(root: Path, sources: dict[str, SourceFile]) -> None:
    whole = {name: (root / "math" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    random_ = random.Random(0)
    for _ in range(400):
        name = random_.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(random_.randint(1, 3)):
            place = random_.randrange(min(len(content), random_.choice((8, 500, len(content)))))
            content[place] ^= 1 << random_.randrange(8)
        (root / "math" / name).write_bytes(content)
        try:
            found = sources["math"].read().digest
        except AdapterError as error:
            found = str(error)
        assert found == sources["math"].digest or sources["math"].folder in found
        assert found.isprintable()
        (root / "math" / name).write_bytes(whole[name])
    assert held(store(), sources["math"]) == [sources["math"].digest]
