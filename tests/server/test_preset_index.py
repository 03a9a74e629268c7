"""Presets that come and go while the server runs."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from admin_harness import Site, refused

from merging.errors import nearest
from server.preset_file import PresetFile, save_preset_file
from server.preset_index import MOST
from server.presets import Preset


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Site(tmp_path, presets={"old": "math+style"}) as site:
        yield site


async def test_a_preset_is_there_at_once_and_gone_at_once(site: Site) -> None:
    reply = await site.post("presets", name="tutor", recipe="lego-3(math + code*0.50)")
    assert reply.status_code == 201
    assert reply.json() == {
        "name": "tutor", "recipe": "lego-3(code*0.5+math)", "adapters": {}, "given": False, "kept": True,
        "lora": {
            "method": "lego", "adapters": [{"name": "code", "weight": 0.5}, {"name": "math", "weight": 1.0}], "rank": None,
            "options": {"rank": 3},
        },
    }  # fmt: skip
    assert (await site.names())[-2:] == ["old", "tutor"]
    assert (await site.ask("tutor")).json()["model"].startswith("lego-3(code*0.5+math)@")
    assert [card["name"] for card in (await site.get("presets"))["data"]] == ["old", "tutor"]
    assert site.harness.metric("loramix_presets") == 2
    assert (await site.delete("presets/tutor")).status_code == 204
    refused(await site.ask("tutor"), 404)
    refused(await site.delete("presets/tutor"), 404, "GET /v1/lora/presets")
    assert site.harness.metric("loramix_presets") == 1


async def test_what_is_listed_as_lora_is_the_same_recipe_again(site: Site) -> None:
    lora = {"method": "cat", "adapters": [{"name": "math", "weight": {"*.q_proj": 0.25, "*": 1}}, {"name": "code"}]}
    first = await site.post("presets", name="one", recipe=lora)
    again = await site.post("presets", name="other", recipe=first.json()["lora"])
    assert again.status_code == 201, again.text
    keys = [(await site.ask(name)).headers["x-loramix-key"] for name in ("one", "other")]
    assert keys[0] == keys[1]


async def test_another_recipe_takes_the_name_over(site: Site) -> None:
    assert (await site.post("presets", name="tutor", recipe="math")).status_code == 201
    assert (await site.post("presets", name="tutor", recipe="code")).status_code == 200
    assert (await site.ask("tutor")).json()["model"].startswith("code@")
    refused(await site.post("presets", name="tutor", recipe="cat(maths)"), 404)
    assert (await site.ask("tutor")).json()["model"].startswith("code@")


async def test_a_preset_follows_the_name_of_its_adapter(site: Site) -> None:
    site.put("new", 5)
    await site.post("adapters", name="new", path="new")
    await site.post("presets", name="tutor", recipe="new+math*0.5")
    before = (await site.ask("tutor")).headers["x-loramix-key"]
    site.put("new", 6)
    await site.post("adapters", name="new", path="new")
    assert (await site.ask("tutor")).headers["x-loramix-key"] != before


async def test_the_content_of_a_preset_file_is_a_preset(site: Site, tmp_path: Path) -> None:
    digests = {card["name"]: card["digest"] for card in (await site.get("adapters"))["data"]}
    spec = site.harness.recipe("cat(math*0.7+code)").spec
    save_preset_file(PresetFile.of(spec, digests, {"loss": 0.5}), tmp_path / "learned.json")
    file = PresetFile.model_validate_json((tmp_path / "learned.json").read_bytes()).model_dump()
    reply = await site.post("presets", name="learned", **file)
    assert (reply.status_code, reply.json()["adapters"]) == (201, {name: digests[name] for name in ("math", "code")})
    file["adapters"]["math"] = "0" * 64
    refused(await site.post("presets", name="learned", **file), 400, "another content of adapter 'math'", "loramix fit")
    del file["adapters"]["math"]
    refused(await site.post("presets", name="learned", **file), 400, "no digest of 'math'")


async def test_a_file_is_not_read_for_a_request(site: Site, tmp_path: Path) -> None:
    """On the command line a recipe may be the path of one."""
    spec = site.harness.recipe("math").spec
    save_preset_file(PresetFile.of(spec, {"math": "0" * 64}, {}), tmp_path / "learned.json")
    refused(await site.post("presets", name="x", recipe=str(tmp_path / "learned.json")), 400, "expected")
    refused(await site.post("presets", name="x", recipe="learned.json"), 404, "no adapter 'learned.json'")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"recipe": "cat(math"}, 400, "expected ')'"), ({"recipe": "math+nobody"}, 404, "no adapter 'nobody'"),
        ({"recipe": "cat(math+code+style)"}, 400, "--max-lora-rank"), ({"recipe": "old"}, 404, "no adapter 'old'"),
        ({}, 400, "recipe: field required"), ({"recipe": 7}, 400, "recipe"), ({"recipe": "math", "fit": 7}, 400, "fit: "),
        ({"recipe": "math", "adapters": ["math"]}, 400, "adapters: "), ({"recipe": "math", "x": 1}, 400, "x: extra"),
        ({"recipe": {"adapters": [{"name": "math", "weight": "much"}]}}, 400, "recipe.object.adapters.0.weight"),
        ({"recipe": {"adapters": []}}, 400, "adapters"), ({"recipe": "tiny"}, 404, "no adapter 'tiny'"),
        ({"recipe": "math", "fit": {"x": "\ud800"}}, 400, ""),
        ({"recipe": "math", "fit": nested(500)}, 400, "cannot be kept as JSON"),
    ],
)  # fmt: skip
async def test_what_cannot_be_a_preset_is_refused(site: Site, body: dict[str, Any], status: int, says: str) -> None:
    refused(await site.post("presets", name="new", **body), status, says)
    assert "new" not in await site.names()


async def test_a_limited_key_sees_presets_of_its_adapters_alone(site: Site) -> None:
    await site.post("presets", name="open", recipe="math+style")
    await site.post("presets", name="shut", recipe="math+code")
    async with site.by("some") as client:
        names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert names == ["tiny", "math", "style", "old", "open"]
        assert (await client.post("/v1/completions", json={"model": "open"})).status_code == 200
        refused(await client.post("/v1/completions", json={"model": "shut"}), 404)


async def test_there_are_so_many_presets_and_no_more(site: Site) -> None:
    spec = site.harness.recipe("math").spec
    for number in range(MOST - 1):
        site.admin.presets._put(f"preset-{number}", Preset(spec))
    assert len(await site.names()) == MOST + 4
    refused(await site.post("presets", name="one-more", recipe="math"), 409, "10000 presets", "delete some")
    assert (await site.post("presets", name="preset-7", recipe="code")).status_code == 200
    assert (await site.delete("presets/preset-8")).status_code == 204
    assert (await site.post("presets", name="one-more", recipe="math")).status_code == 201
    assert "did you mean" not in (await site.ask("preset-x")).text  # nobody pays for a comparison with all of them
    assert nearest("preset-x", [f"preset-{number}" for number in range(1001)]) == ""


async def test_many_changes_at_once_are_all_made(site: Site) -> None:
    async def change(number: int) -> None:
        assert (await site.post("presets", name=f"p{number}", recipe=f"math*0.{number}")).status_code == 201
        if number % 2:
            assert (await site.delete(f"presets/p{number}")).status_code == 204

    await asyncio.gather(*(change(number) for number in range(1, 40)))
    left = {f"p{number}" for number in range(2, 40, 2)}
    assert {card["name"] for card in (await site.get("presets"))["data"]} == left | {"old"}
    assert {path.stem for path in (site.root / "state" / "presets").iterdir()} == left
