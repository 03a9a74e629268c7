"""Where adapters may be added from: nothing outside is read, whatever the path is, and whatever changes meanwhile."""

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from admin_harness import Site, refused

from server import wanted
from server.allowed import Allowed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Site(tmp_path) as site:
        yield site


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are read."""
    folders: list[Path] = []
    survey = wanted.survey_anew
    monkeypatch.setattr(wanted, "survey_anew", lambda folder: (folders.append(folder), survey(folder))[1])
    return folders


def paths(root: Path) -> dict[str, str]:
    """That lead to the valid adapter outside, or somewhere else where adapters may not come from."""
    outside = str(root / "outside" / "secret")
    return {
        "absolute": outside, "above": "../outside/secret", "through": "../more/../outside/secret", "not there": "../nothing",
        "the system": "/etc", "root": "/", "beside, with the beginning of a root's name": f"{root}/more-of-it",
        "above itself": "..", "many": "../" * 40 + outside[1:], "slashes": f"//{outside}",
        "dots": f"{root}/more/./../outside/secret", "link": "link", "link in a link": "inside/link",
        "link to above": "up/outside/secret", "absolute link": f"{root}/more/link", "device": "/dev/zero",
        "process": "/proc/self/cwd",
    }  # fmt: skip


@pytest.mark.parametrize("case", paths(Path("/")))
async def test_what_lies_outside_is_refused_unread_be_it_there_or_not(site: Site, read: list[Path], case: str) -> None:
    more = site.root / "more"
    shutil.copytree(site.root / "outside" / "secret", site.root / "more-of-it")
    (more / "link").symlink_to(site.root / "outside" / "secret")
    (more / "up").symlink_to("..")
    (more / "inside").mkdir()
    (more / "inside" / "link").symlink_to("../link")
    refused(await site.post("adapters", name="new", path=paths(site.root)[case]), 403, "--adapter-root")
    assert read == []
    assert "new" not in await site.names()


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
async def test_a_file_that_is_a_link_to_outside_is_refused_unread(site: Site, read: list[Path], file: str) -> None:
    folder = site.put("new", 5)
    (folder / file).unlink()
    (folder / file).symlink_to(site.root / "outside" / "secret" / file)
    refused(await site.post("adapters", name="new", path="new"), 403, file, "leads out")
    assert read == []


async def test_links_that_stay_inside_are_followed_once(site: Site) -> None:
    """As in a Hub's cache, where files are links; and between two roots."""
    folder = site.put("new", 5)
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(site.root / "more" / f"blob-{name}")
        (folder / name).symlink_to(f"../blob-{name}")
    (site.root / "more" / "elsewhere").symlink_to(site.root / "adapters" / "math")
    assert (await site.post("adapters", name="new", path="new")).status_code == 201
    assert (await site.post("adapters", name="other", path="elsewhere")).json()["path"] == str(site.root / "adapters" / "math")


async def test_a_link_that_is_turned_while_the_adapter_is_read_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site.put("new", 5)
    survey = wanted.survey_anew

    def turn(path: Path) -> Any:
        folder.rename(folder.parent / "aside")
        folder.symlink_to(site.root / "outside" / "secret")
        return survey(path)

    monkeypatch.setattr(wanted, "survey_anew", turn)
    refused(await site.post("adapters", name="new", path="new"), 403, "leads out")
    assert "new" not in await site.names()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nothing", "no such folder"), ("a\0b", "should match pattern"), ("", "at least 1 character"),
        ("x" * 5000, "at most 4096"), ("x" * 300, "no such folder"), ("x/" * 2000, "no such folder"),
        ("~", "no such folder"), ("$HOME", "no such folder"),
        (".", "adapter_config.json is missing"), ("file", "no such folder"), ("loop", "no such folder"),
        ("pipe", "no such folder"), ("http://localhost/x", "no such folder"), ("nowhere", "no such folder"),
    ],
)  # fmt: skip
async def test_what_is_inside_and_no_adapter_is_refused_with_the_reason(site: Site, path: str, says: str) -> None:
    more = site.root / "more"
    (more / "file").write_text("no folder")
    (more / "loop").symlink_to("loop")
    (more / "nowhere").symlink_to("not here")
    os.mkfifo(more / "pipe")
    refused(await site.post("adapters", name="new", path=path), 400, says)


@pytest.mark.parametrize(
    "name", ["..", ".", ".hidden", "-x", "a/b", "../x", "a b", "", "x" * 129, "a\0", "ａ", "a\n", "%2e%2e", "a+b", 7, None]
)
async def test_a_name_is_no_path(site: Site, name: Any) -> None:  # fmt: skip
    site.put("new", 5)
    for path, body in (("adapters", {"path": "new"}), ("presets", {"recipe": "math"})):
        refused(await site.post(path, name=name, **body), 400, "name: ")
    assert sorted(path.name for path in site.root.rglob("*.json") if "state" in path.parts) == []


@pytest.mark.parametrize(
    "path", ["adapters/..%2f..%2fkeys.toml", "presets/..%2fx", "cache/..%2fx", "adapters/%00", "cache/" + "0" * 5000]
)
async def test_what_is_deleted_is_looked_up_by_name_alone(site: Site, path: str) -> None:  # fmt: skip
    assert (await site.delete(path)).status_code == 404
    assert (site.root / "keys.toml").exists()


@pytest.mark.parametrize(
    "body",
    [
        {}, [], "x", 7, None, {"name": "new"}, {"name": "new", "path": "new", "repo": "a/b"}, {"name": "new", "path": 7},
        {"name": "new", "path": ["new"]}, {"name": "new", "path": "new", "revision": "main"}, {"name": "new", "repo": "a"},
        {"name": "new", "repo": "../.."}, {"name": "new", "repo": "a/b/c"}, {"name": "new", "repo": "a/b", "revision": "x y"},
        {"name": "new", "path": "new", "unknown": 1}, {"name": "new", "path": {"deep": [[[[]]]]}},
    ],
)  # fmt: skip
async def test_a_body_of_the_wrong_form_is_refused_in_one_line(site: Site, body: Any) -> None:
    site.put("new", 5)
    reply = await site.client.post("/v1/lora/adapters", json=body)
    refused(reply, 400)
    assert "\n" not in reply.json()["error"]["message"]


async def test_bodies_that_are_no_json_or_too_large_are_refused(site: Site) -> None:
    post, json_ = site.client.post, {"content-type": "application/json"}
    refused(await post("/v1/lora/adapters", content=b"{", headers=json_), 400, "no JSON")
    refused(await post("/v1/lora/adapters", content=b"\xff\xfe", headers=json_), 400)
    refused(await post("/v1/lora/adapters", content=b"[" * 100_000, headers=json_), 400)
    refused(await post("/v1/lora/adapters", content=b'{"name": "\\ud800", "path": "x"}', headers=json_), 400)
    refused(await post("/v1/lora/adapters", content=b"name=new&path=new"), 400)
    refused(await post("/v1/lora/adapters", content=json.dumps({"name": "x", "path": "x" * 2**20})), 413, "--max-body-mib")


async def test_an_allowed_folder_may_be_named_by_a_link_which_is_settled_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "real" / "x").mkdir(parents=True)
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "root").symlink_to("real")
    allowed = Allowed([tmp_path / "root"], [])
    (tmp_path / "root").unlink()
    (tmp_path / "root").symlink_to("other")
    assert allowed.folder("x") == tmp_path / "real" / "x"


async def test_without_any_folder_none_is_allowed(tmp_path: Path) -> None:
    async with Site(tmp_path, adapters=[], adapter_root=[]) as site:
        for path in (".", "/", str(tmp_path / "adapters" / "math")):
            refused(await site.post("adapters", name="new", path=path), 403)


async def test_only_admins_come_here(site: Site) -> None:
    site.put("new", 5)
    before = await site.get("adapters")
    for key in ("all", "some", "base"):
        async with site.by(key) as client:
            for method, path in (
                ("GET", "adapters"), ("POST", "adapters"), ("DELETE", "adapters/math"), ("GET", "cache"), ("DELETE", "cache/x"),
                ("POST", "warm"), ("GET", "presets"), ("POST", "presets"), ("DELETE", "presets/x"),
            ):  # fmt: skip
                body = {"name": "new", "path": "new", "recipe": "math"}
                reply = await client.request(method, f"/v1/lora/{path}", json=None if method == "GET" else body)
                refused(reply, 403, "needs an admin key")
    assert await site.get("adapters") == before
