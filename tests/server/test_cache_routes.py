"""What is in slots, as admins see it: listed, built ahead, pinned, evicted."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from admin_harness import Site, refused
from harness import settle

from merging import AdapterError
from server.errors import BusyError


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """With three slots."""
    async with Site(tmp_path) as site:
        yield site


async def states(site: Site) -> dict[str, tuple[str, int, bool]]:
    return {
        entry["name"].partition("@")[0]: (entry["state"], entry["leases"], entry["pinned"])
        for entry in (await site.get("cache"))["data"]
    }


async def test_all_that_is_resident_or_being_built_is_listed(site: Site) -> None:
    site.engine.disk = "hit"
    key = (await site.ask("math+code")).headers["x-loramix-key"]
    site.engine.disk = None
    site.engine.hold = True
    asking = asyncio.create_task(site.ask("code"))
    await settle()
    cache = await site.get("cache")
    assert cache["slots"] == {"total": 3, "free": 1, "pins": 2}
    resident, building = cache["data"]
    assert resident.pop("idle_seconds") >= building.pop("idle_seconds") >= 0
    assert resident == {
        "key": key, "name": f"cat(code+math)@{key[:12]}", "state": "resident", "leases": 0, "pinned": False, "bytes": 100,
        "source": "disk",
    }  # fmt: skip
    assert (building["state"], building["leases"], building["bytes"], building["source"]) == ("building", 1, None, None)
    site.engine.finish(site.harness.recipe("code"))
    await asking
    assert await states(site) == {"cat(code+math)": ("resident", 0, False), "code": ("resident", 0, False)}


async def test_what_was_warmed_is_there_for_the_first_request(site: Site) -> None:
    for recipe, name in (
        ("math", "math"), ("lego-3(math+code)", "lego-3(code+math)"),
        ({"adapters": [{"name": "code", "weight": {"*.q_proj": 0.5}}]}, "cat(code*…)"),
    ):  # fmt: skip
        reply = await site.post("warm", recipe=recipe)
        assert reply.status_code == 200, reply.text
        warmed = reply.json()
        assert (warmed["tier"], warmed["pinned"]) == ("merged", False)
        assert warmed["ms"] > 0
        assert warmed["name"] == f"{name}@{warmed['key'][:12]}"
        assert (await site.post("warm", recipe=recipe)).json() == {**warmed, "tier": "device", "ms": 0.0}
    assert (await site.ask("lego-3(code+math)")).headers["x-loramix-cache"] == "device"
    assert site.harness.metric("loramix_leases") == 0


async def test_a_pinned_one_outlives_any_number_of_others(site: Site) -> None:
    key = (await site.post("warm", recipe="math+code", pin=True)).json()["key"]
    for number in range(1, 20):
        assert (await site.ask(f"math*0.{number:02}")).status_code == 200
    assert (await site.ask("math+code")).headers["x-loramix-cache"] == "device"
    assert (await states(site))["cat(code+math)"] == ("resident", 0, True)
    assert (await site.post("warm", recipe="math+code")).json()["pinned"]  # warming it without a pin takes none away
    assert (await site.delete(f"cache/{key}")).status_code == 204
    assert "cat(code+math)" not in await states(site)
    assert key not in site.engine.resident


async def test_one_slot_is_left_without_a_pin(site: Site) -> None:
    for recipe in ("math", "code", "math"):
        assert (await site.post("warm", recipe=recipe, pin=True)).status_code == 200
    refused(await site.post("warm", recipe="style", pin=True), 409, "2 of 3 slots are pinned", "--max-loras")
    assert len(site.engine.built) == 2  # it was refused before it was built
    for number in range(1, 10):
        assert (await site.ask(f"style*0.{number}")).status_code == 200
    assert {name for name, (_, _, pinned) in (await states(site)).items() if pinned} == {"math", "code"}


async def test_of_more_pins_at_once_than_there_may_be_the_rest_is_refused(site: Site) -> None:
    site.engine.hold = True
    recipes = ["math", "code", "style"]
    asking = [asyncio.create_task(site.post("warm", recipe=recipe, pin=True)) for recipe in recipes]
    await settle()
    for recipe in recipes:
        site.engine.finish(site.harness.recipe(recipe))
    replies = await asyncio.gather(*asking)
    assert sorted(reply.status_code for reply in replies) == [200, 200, 409]
    assert sum(pinned for _, _, pinned in (await states(site)).values()) == 2
    assert site.harness.metric("loramix_leases") == 0


async def test_an_engine_of_one_slot_has_no_pins(tmp_path: Path) -> None:
    async with Site(tmp_path, slots=1) as site:
        refused(await site.post("warm", recipe="math", pin=True), 409, "0 of 1 slots")
        assert (await site.post("warm", recipe="math")).status_code == 200


async def test_a_pin_counts_for_nobodys_share(site: Site) -> None:
    """Its holder's own requests are not made to wait for it to end."""
    for recipe in ("math", "code"):
        await site.post("warm", recipe=recipe, pin=True)
    for number in range(1, 5):
        assert (await asyncio.wait_for(site.ask(f"style*0.{number}"), 2)).status_code == 200


async def test_what_requests_use_or_wait_for_is_not_evicted(site: Site) -> None:
    site.streaming = asyncio.Event()
    stream = asyncio.create_task(site.ask("math"))
    site.engine.hold = True
    waiting = asyncio.create_task(site.ask("code"))
    await settle()
    site.engine.finish(site.harness.recipe("math"))
    await settle()
    for recipe in ("math", "code"):
        refused(await site.delete(f"cache/{site.harness.recipe(recipe).key}"), 409, recipe, "1 requests")
    site.streaming.set()
    site.engine.finish(site.harness.recipe("code"))
    await asyncio.gather(stream, waiting)
    for recipe in ("math", "code"):
        assert (await site.delete(f"cache/{site.harness.recipe(recipe).key}")).status_code == 204
    assert (await site.get("cache"))["slots"]["free"] == 3
    assert site.engine.free == 3


async def test_a_slot_that_is_being_emptied_is_given_to_nobody_before_it_is(tmp_path: Path) -> None:
    async with Site(tmp_path, slots=1) as site:
        key = (await site.post("warm", recipe="math")).json()["key"]
        site.engine.hold_evictions = asyncio.Event()
        evicting = asyncio.create_task(site.delete(f"cache/{key}"))
        await settle()
        asking = [asyncio.create_task(site.ask(recipe)) for recipe in ("math", "code")]
        await asyncio.sleep(0.05)
        assert len(site.engine.built) == 1
        refused(await site.delete(f"cache/{key}"), 409)  # by now it is asked for again
        site.engine.hold_evictions.set()
        assert (await evicting).status_code == 204
        assert {reply.status_code for reply in await asyncio.gather(*asking)} == {200}


async def test_a_slot_that_could_not_be_emptied_is_emptied_for_the_next_build(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = (await site.post("warm", recipe="math")).json()["key"]
    for number in (1, 2):
        await site.ask(f"code*0.{number}")

    async def fail(resident: Any) -> None:
        raise BusyError("the engine does not answer")

    monkeypatch.setattr(site.engine, "evict", fail)
    refused(await site.delete(f"cache/{key}"), 503)
    assert (await site.ask("style")).status_code == 200  # in its slot
    assert key not in site.engine.resident


@pytest.mark.parametrize("key", ["x", "0" * 64])
async def test_what_is_evicted_is_named_by_its_whole_key(site: Site, key: str) -> None:
    resident = (await site.post("warm", recipe="math")).json()["key"]
    refused(await site.delete(f"cache/{key}"), 404, "GET /v1/lora/cache")
    refused(await site.delete(f"cache/{resident[:12]}"), 404)
    refused(await site.delete(f"cache/{resident.upper()}"), 404)


@pytest.mark.parametrize(
    ("recipe", "status", "says"),
    [
        ("maths", 404, "did you mean 'math'"), ("math+", 400, "expected an adapter's name"), ("tiny", 400, "base model"),
        ("", 400, "at least 1 character"), ("x" * 5000, 400, "at most 4096"), (7, 400, "recipe"), (None, 400, "recipe"),
        ([], 400, "recipe"), ({}, 400, "adapters: field required"), ({"adapters": [{"name": 7}]}, 400, "adapters.0.name"),
        ({"adapters": [{"name": "nobody"}]}, 404, "no adapter 'nobody'"), ("cat(math+code+style)", 400, "--max-lora-rank"),
    ],
)  # fmt: skip
async def test_errors_are_those_of_requests(site: Site, recipe: Any, status: int, says: str) -> None:
    refused(await site.post("warm", recipe=recipe, pin=True), status, says)


async def test_a_build_that_fails_pins_nothing(site: Site) -> None:
    site.engine.failures[site.harness.recipe("math").key] = AdapterError("it has changed")
    refused(await site.post("warm", recipe="math", pin=True), 400, "it has changed")
    assert await states(site) == {}


async def test_a_pin_does_not_keep_what_its_adapter_was(site: Site) -> None:
    site.put("new", 5)
    await site.post("adapters", name="new", path="new")
    await site.post("warm", recipe="new+math*0.5", pin=True)
    site.put("new", 6)
    await site.post("adapters", name="new", path="new")
    await settle()
    assert await states(site) == {}
    assert site.engine.resident == set()
