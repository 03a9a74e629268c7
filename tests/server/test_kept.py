"""The state folder: what was added is there at the next start, or it is said why not; nothing in it is read as else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from admin_harness import Site, refused
from typer.testing import CliRunner

from server.cli import app
from server.errors import ConfigError
from server.kept import Kept


async def added(root: Path) -> None:
    async with Site(root) as site:
        site.put("new", 5)
        assert (await site.post("adapters", name="new", path="new")).status_code == 201
        assert (await site.post("presets", name="tutor", recipe="lego-3(new+math*0.5)")).status_code == 201


async def test_a_restarted_server_has_what_was_added(tmp_path: Path) -> None:
    async with Site(tmp_path) as site:
        site.put("new", 5)
        await site.post("adapters", name="new", path="new")
        digests = {card["name"]: card["digest"] for card in (await site.get("adapters"))["data"]}
        await site.post("presets", name="tutor", recipe="lego-3(new+math*0.5)")
        lora = {"adapters": [{"name": "new", "weight": {"*.q_proj": 0.25, "*": -1e-4}}]}
        await site.post("presets", name="learned", recipe=lora, adapters={"new": digests["new"]}, fit={"loss": 0.25})
        await site.post("presets", name="gone", recipe="math")
        await site.delete("presets/gone")
        listed, presets = await site.get("adapters"), await site.get("presets")
        keys = [(await site.ask(name)).headers["x-loramix-key"] for name in ("new", "tutor", "learned")]
    async with Site(tmp_path, default_method="svd") as again:  # what a preset means does not hang on it
        assert await again.names() == ["tiny", "code", "math", "style", "new", "learned", "tutor"]
        assert await again.get("presets") == presets
        assert [{**card, "compositions": 0} for card in listed["data"]] == (await again.get("adapters"))["data"]
        assert [(await again.ask(name)).headers["x-loramix-key"] for name in ("new", "tutor", "learned")] == keys
    file = json.loads((tmp_path / "state" / "presets" / "learned.json").read_text())
    assert (file["adapters"], file["fit"]) == ({"new": digests["new"]}, {"loss": 0.25})
    assert json.loads((tmp_path / "state" / "adapters" / "new.json").read_text()) == {
        "path": str(tmp_path / "more" / "new"), "digest": digests["new"],
    }  # fmt: skip


async def test_without_a_folder_what_was_added_ends_with_the_server(tmp_path: Path) -> None:
    async with Site(tmp_path, state_dir=None) as site:
        site.put("new", 5)
        assert not (await site.post("adapters", name="new", path="new")).json()["kept"]
        assert not (await site.post("presets", name="tutor", recipe="math")).json()["kept"]
    assert not (tmp_path / "state").exists()


async def test_the_command_line_wins_over_what_was_kept(tmp_path: Path) -> None:
    await added(tmp_path)
    site = Site(tmp_path, adapter={"new": str(tmp_path / "outside" / "secret")}, presets={"tutor": "math"})
    async with site:
        assert "command line has an adapter" in site.admin.adapters.skipped["new"]
        assert "command line has a preset" in site.admin.presets.skipped["tutor"]
        assert {card["path"] for card in (await site.get("adapters"))["data"] if card["name"] == "new"} == {
            str(tmp_path / "outside" / "secret")
        }
        assert (await site.ask("tutor")).json()["model"].startswith("math@")
    site = Site(tmp_path, adapter={"tutor": str(tmp_path / "adapters" / "math")}, presets={"new": "math"})
    async with site:
        assert "name of a preset" in site.admin.adapters.skipped["new"]
        assert "name of an adapter" in site.admin.presets.skipped["tutor"]
    async with Site(tmp_path) as back:  # it is kept all the same
        assert {"new", "tutor"} <= set(await back.names())


@pytest.mark.parametrize("damage", ["gone", "changed", "broken", "link to outside", "root not allowed any more"])
async def test_what_is_not_there_or_not_the_same_any_more_is_left_out_with_the_reason(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    await added(tmp_path)
    folder, settings = tmp_path / "more" / "new", {}
    says = {"gone": "no such folder", "changed": "another adapter than the one that was added", "broken": "truncated"}
    match damage:
        case "gone":
            shutil.rmtree(folder)
        case "changed":
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "adapters" / "code", folder)
        case "broken":
            os.truncate(folder / "adapter_model.safetensors", 50)
        case "link to outside":
            folder.rename(tmp_path / "outside" / "new")
            folder.symlink_to(tmp_path / "outside" / "new")
        case _:
            settings = {"adapter_root": []}
    async with Site(tmp_path, **settings) as site:
        assert await site.names() == ["tiny", "code", "math", "style"]
        (skipped,) = (await site.get("adapters"))["skipped"]
        assert skipped["name"] == "new"
        assert says.get(damage, "--adapter-root") in skipped["reason"]
        assert f"adapter new, which was kept, is left out: {skipped['reason']}" in caplog.messages
        (skipped,) = (await site.get("presets"))["skipped"]
        assert (skipped["name"], "no adapter 'new'" in skipped["reason"]) == ("tutor", True)
        if damage == "gone":
            for path in ("adapters/new", "presets/tutor"):
                assert (await site.delete(path)).status_code == 204
            assert (await site.get("adapters"))["skipped"] == (await site.get("presets"))["skipped"] == []
            assert list((tmp_path / "state").rglob("*.json")) == []
        if damage == "changed":
            assert (await site.post("adapters", name="new", path="new")).json()["outcome"] == "added"
            assert (await site.get("adapters"))["skipped"] == []
    if damage == "changed":
        async with Site(tmp_path) as again:
            assert {"new", "tutor"} <= set(await again.names())


BAD: dict[str, Any] = {
    "torn": "{", "empty": "", "a list": "[]", "another's": '{"hello": 1}',
    "two places": '{"path": "/x", "repo": "a/b", "digest": "%s"}',
    "no digest": '{"path": "/x"}', "no commit": '{"repo": "a/b", "digest": "%s"}', "not UTF-8": b"\xff\xfe{",
    "a number for a path": '{"path": 7, "digest": "%s"}', "too deep": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["adapters", "presets"])
@pytest.mark.parametrize("case", BAD)
def test_a_file_that_no_server_has_written_stops_the_start(tmp_path: Path, kind: str, case: str) -> None:
    file = tmp_path / kind / "new.json"
    file.parent.mkdir()
    content = BAD[case]
    file.write_bytes(content if isinstance(content, bytes) else content.replace("%s", "0" * 64).encode())
    with pytest.raises(ConfigError, match="damaged, or not of this server") as raised:
        Kept(tmp_path)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["new.txt", "new", "new.json.bak"])
def test_a_strange_file_stops_the_start_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"{name} is no file of a loramix server"):
        Kept(tmp_path)


def test_pipes_folders_and_dangling_links_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    for make in (os.mkfifo, Path.mkdir, lambda place: place.symlink_to("nowhere")):
        make(tmp_path / "adapters" / "new.json")
        with pytest.raises(ConfigError, match=r"new\.json is no file of a loramix server"):
            Kept(tmp_path)
        place = tmp_path / "adapters" / "new.json"
        place.rmdir() if place.is_dir() else place.unlink()


def test_what_a_killed_server_was_writing_is_no_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / ".abcdef").write_text("{")
    assert Kept(tmp_path).adapters == {}


def test_a_folder_that_cannot_be_used_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = CliRunner().invoke(app, ["serve", "model", "--state-dir", str(tmp_path / "file")]).exception
    assert isinstance(said, ConfigError)
    assert "--state-dir" in str(said)


async def test_a_disk_that_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await added(tmp_path)
    async with Site(tmp_path) as site:
        before = (await site.get("adapters"), await site.get("presets"))

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        site.put("other", 6)
        refused(await site.post("adapters", name="other", path="other"), 500, "No space left", "nothing was changed")
        refused(await site.post("presets", name="other", recipe="math"), 500, "No space left")
        refused(await site.post("presets", name="tutor", recipe="math"), 500)
        assert (await site.get("adapters"), await site.get("presets")) == before
        assert sorted(path.name for path in (tmp_path / "state").rglob("*") if path.is_file()) == ["new.json", "tutor.json"]


async def test_a_replaced_adapter_is_kept_as_what_it_is_now(tmp_path: Path) -> None:
    await added(tmp_path)
    async with Site(tmp_path) as site:
        site.put("new", 6)
        digest = (await site.post("adapters", name="new", path="new")).json()["digest"]
    async with Site(tmp_path) as again:
        assert {card["name"]: card["digest"] for card in (await again.get("adapters"))["data"]}["new"] == digest
