"""Adapters that come, change and go while the server runs: a name means what was checked last, and nothing stale answers."""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import httpx
import pytest
import pytest_asyncio
from admin_harness import Site, refused
from harness import MODULES, settle, tiny_adapter

from merging import LoraAdapter, LoraModule, save_adapter
from merging.peft_folder import WEIGHTS
from server import wanted


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Site(tmp_path) as site:
        yield site


async def test_the_command_lines_adapters_are_listed_with_what_they_are(site: Site) -> None:
    listed = await site.get("adapters")
    assert [card["name"] for card in listed["data"]] == ["code", "math", "style"]
    math = listed["data"][1]
    assert len(math.pop("digest")) == 64
    assert math == {
        "name": "math", "rank": 4, "modules": 3, "bytes": 4 * 4 * sum(map(sum, MODULES.values())), "base_model": "tiny",
        "path": str(site.root / "adapters" / "math"), "repo": None, "revision": None, "compositions": 0, "given": True,
        "kept": False,
    }  # fmt: skip
    assert listed["skipped"] == []


async def test_an_adapter_is_there_at_once_and_gone_at_once(site: Site) -> None:
    site.put("new", 5)
    reply = await site.post("adapters", name="fresh", path="new")
    assert reply.status_code == 201, reply.text
    assert reply.json()["outcome"] == "added"
    assert (reply.json()["kept"], reply.json()["given"]) == (True, False)
    assert "fresh" in await site.names()
    assert site.harness.metric("loramix_adapters") == 4
    assert (await site.ask("cat(fresh+math*0.5)")).json()["model"].startswith("cat(fresh+math*0.5)@")
    assert [card["compositions"] for card in (await site.get("adapters"))["data"]] == [0, 1, 1, 0]
    assert (await site.delete("adapters/fresh")).status_code == 204
    assert "fresh" not in await site.names()
    refused(await site.ask("fresh"), 404)
    refused(await site.delete("adapters/fresh"), 404, "no adapter 'fresh' here")
    assert site.harness.metric("loramix_adapters") == 3


async def test_the_same_content_again_changes_nothing(site: Site) -> None:
    site.put("new", 5)
    first = await site.post("adapters", name="new", path="new")
    key = (await site.ask("new")).json()
    again = await site.post("adapters", name="new", path=str(site.root / "more" / "new"))
    assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
    assert again.json()["digest"] == first.json()["digest"]
    assert (await site.ask("new")).json() == key
    assert len(site.engine.built) == 1


async def test_other_content_under_a_name_is_another_adapter_from_the_answer_on(site: Site) -> None:
    site.put("new", 5)
    old = (await site.post("adapters", name="new", path="new")).json()
    before = (await site.ask("new")).json()["model"]
    site.put("new", 6)
    assert (await site.ask("new")).json()["model"] == before  # until it is told, the server holds to what it has checked
    reply = await site.post("adapters", name="new", path="new")
    assert (reply.status_code, reply.json()["outcome"]) == (200, "replaced")
    await settle()
    after = (await site.ask("new")).json()["model"]
    assert after != before
    assert site.engine.forgotten == [{old["digest"], site.engine.forgotten[0].difference({old["digest"]}).pop()}]
    assert len(site.engine.resident) == 1  # what was merged of the old one is out of its slot
    site.put("new", 5)
    back = await site.post("adapters", name="new", path="new")
    assert back.json()["digest"] == old["digest"]
    assert (await site.ask("new")).json()["model"] == before


async def test_a_change_is_seen_though_times_and_sizes_of_the_files_are_as_before(site: Site) -> None:
    folder = site.put("new", 5)
    stat = (folder / WEIGHTS).stat()
    first = (await site.post("adapters", name="new", path="new")).json()["digest"]
    site.put("new", 6)
    assert (folder / WEIGHTS).stat().st_size == stat.st_size
    for name in os.listdir(folder):
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (await site.post("adapters", name="new", path="new")).json()["digest"] != first


async def test_a_broken_adapter_is_refused_and_the_old_one_stays(site: Site) -> None:
    folder = site.put("new", 5)
    before = (await site.post("adapters", name="new", path="new")).json()["digest"]
    os.truncate(folder / WEIGHTS, 100)
    refused(await site.post("adapters", name="new", path="new"), 400, "truncated", str(folder))
    save_adapter(LoraAdapter({"lm_head": LoraModule(tiny_adapter(2, 0).modules["model.layers.0.q_proj"].a,
                              tiny_adapter(2, 0).modules["model.layers.0.q_proj"].b)}), folder, replace=True)  # fmt: skip
    refused(await site.post("adapters", name="new", path="new"), 400, "no effect", "--lora-target-modules")
    site.put("new", 5, rank=9)
    refused(await site.post("adapters", name="new", path="new"), 400, "--max-lora-rank 9")
    site.put("wide", 5)
    with (site.root / "more" / "wide" / WEIGHTS).open("ab") as weights:
        weights.truncate(2**40)  # sparse: it takes no room here, and would take a TiB in memory
    refused(await site.post("adapters", name="new", path="wide"), 400, f"{2**40} bytes, over the")
    assert {card["name"]: card["digest"] for card in (await site.get("adapters"))["data"]}["new"] == before
    assert (await site.ask("new")).status_code == 200


async def test_names_that_others_have_are_refused(site: Site) -> None:
    site.put("new", 5)
    await site.post("presets", name="tutor", recipe="math+code")
    for name in ("tiny", "tutor"):
        refused(await site.post("adapters", name=name, path="new"), 409, repr(name))
    refused(await site.post("presets", name="math", recipe="code"), 409, "'math'")


async def test_what_a_preset_uses_stays_until_the_preset_goes(site: Site) -> None:
    site.put("new", 5)
    await site.post("adapters", name="new", path="new")
    for number in range(7):
        await site.post("presets", name=f"p{number}", recipe=f"new*0.{number + 1}+math")
    refused(await site.delete("adapters/new"), 409, "presets p0, p1, p2, p3, p4 and 2 more")
    for number in range(7):
        assert (await site.delete(f"presets/p{number}")).status_code == 204
    assert (await site.delete("adapters/new")).status_code == 204


async def test_other_content_is_refused_while_a_preset_is_made_for_what_is_there(site: Site) -> None:
    site.put("new", 5)
    digest = (await site.post("adapters", name="new", path="new")).json()["digest"]
    lora = {"adapters": [{"name": "new", "weight": 0.7}]}
    assert (await site.post("presets", name="learned", recipe=lora, adapters={"new": digest})).status_code == 201
    site.put("new", 6)
    refused(await site.post("adapters", name="new", path="new"), 409, "preset learned is made for the content")
    await site.delete("presets/learned")
    assert (await site.post("adapters", name="new", path="new")).json()["outcome"] == "replaced"


async def test_deletion_waits_for_those_who_use_it_and_then_frees_everything(site: Site) -> None:
    site.put("new", 5)
    digest = (await site.post("adapters", name="new", path="new")).json()["digest"]
    await site.ask("cat(new+style)")  # resident, and nobody uses it
    site.streaming = asyncio.Event()
    stream = asyncio.create_task(site.ask("cat(new+math*0.5)"))
    await settle()
    deleting = asyncio.create_task(site.delete("adapters/new"))
    await asyncio.sleep(0.1)
    assert not deleting.done()
    refused(await site.ask("new"), 404)
    refused(await site.delete("adapters/new"), 404)
    assert len(site.engine.resident) == 1  # the idle one is gone already
    site.streaming.set()
    assert (await stream).status_code == 200
    assert (await deleting).status_code == 204
    assert site.engine.resident == set()
    (forgotten,) = site.engine.forgotten
    assert digest in forgotten
    assert len(forgotten) == 3  # and what the two compositions are known by, should the disk cache have had them
    assert site.harness.metric("loramix_source_bytes", tier="host") == 17
    assert (await site.get("cache"))["slots"]["free"] == 3


async def deleting_beside_a_stream(site: Site) -> tuple[asyncio.Task[httpx.Response], asyncio.Task[httpx.Response]]:
    """A new adapter's stream, which ends when `site.streaming` is set, and its deletion, which waits for that."""
    site.put("new", 5)
    await site.post("adapters", name="new", path="new")
    site.streaming = asyncio.Event()
    stream = asyncio.create_task(site.ask("new"))
    await settle()
    deleting = asyncio.create_task(site.delete("adapters/new"))
    await asyncio.sleep(0.1)
    return stream, deleting


async def test_deletion_goes_on_when_its_client_hangs_up(site: Site) -> None:
    stream, deleting = await deleting_beside_a_stream(site)
    deleting.cancel()
    await settle()
    site.streaming.set()
    await stream
    await settle()
    assert site.engine.resident == set()
    assert len(site.engine.forgotten) == 1


async def test_deletion_waits_for_a_build_that_was_dropped_to_let_go(site: Site) -> None:
    site.put("new", 5)
    await site.post("adapters", name="new", path="new")
    site.engine.hold = True
    leaving = asyncio.create_task(site.harness.composer.ensure(site.harness.recipe("new"), "client"))
    await settle()
    leaving.cancel()
    deleting = asyncio.create_task(site.delete("adapters/new"))
    await asyncio.sleep(0.1)
    assert not deleting.done()
    site.engine.dropped[0].set_result(None)
    assert (await deleting).status_code == 204


async def test_content_that_another_name_has_is_not_freed(site: Site) -> None:
    site.put("new", 5)
    for name in ("one", "other"):
        await site.post("adapters", name=name, path="new")
    await site.ask("one")
    site.streaming = asyncio.Event()
    stream = asyncio.create_task(site.ask("other"))
    await settle()
    assert (await site.delete("adapters/one")).status_code == 204  # it waits for nobody
    assert len(site.engine.resident) == 1
    assert site.engine.forgotten == []
    site.streaming.set()
    await stream


async def test_an_adapter_that_comes_back_while_it_leaves_is_served(site: Site) -> None:
    stream, deleting = await deleting_beside_a_stream(site)
    assert (await site.post("adapters", name="again", path="new")).status_code == 201
    site.streaming.set()
    assert (await site.ask("again")).json()["model"].startswith("new@")  # the same content, which is resident
    await asyncio.gather(stream, deleting)
    assert site.engine.forgotten == []
    assert len(site.engine.resident) == 1


async def test_what_was_looked_up_before_a_deletion_is_not_built_after_it(site: Site) -> None:
    site.put("new", 5)
    await site.post("adapters", name="new", path="new")
    recipe = site.harness.recipe("new")
    site.engine.hold_evictions = asyncio.Event()
    await site.ask("new")
    deleting = asyncio.create_task(site.delete("adapters/new"))
    await asyncio.sleep(0.1)
    with pytest.raises(Exception, match="just been replaced or deleted; try again"):
        await site.harness.composer.ensure(recipe, "late")
    site.engine.hold_evictions.set()
    await deleting
    assert len(site.engine.built) == 1


async def test_the_command_lines_own_is_deleted_and_replaced_for_the_life_of_the_server(site: Site) -> None:
    site.put("new", 5)
    reply = (await site.post("adapters", name="math", path="new")).json()
    assert (reply["outcome"], reply["given"], reply["kept"]) == ("replaced", True, False)
    assert (await site.delete("adapters/code")).status_code == 204
    assert await site.names() == ["tiny", "math", "style"]
    async with Site(site.root) as restarted:
        assert await restarted.names() == ["tiny", "code", "math", "style"]
        assert restarted.admin.adapters.skipped == {}


async def test_of_two_who_add_a_name_at_once_the_last_to_ask_wins(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.put("slow", 5)
    site.put("quick", 6)
    survey = wanted.survey_anew

    def slowly(folder: Path) -> Any:
        if folder.name == "slow":
            time.sleep(0.2)
        return survey(folder)

    monkeypatch.setattr(wanted, "survey_anew", slowly)
    first = asyncio.create_task(site.post("adapters", name="new", path="slow"))
    await asyncio.sleep(0.05)
    last = await site.post("adapters", name="new", path="quick")
    await first
    listed = {card["name"]: card for card in (await site.get("adapters"))["data"]}
    assert listed["new"]["digest"] == last.json()["digest"]
    assert listed["new"]["path"].endswith("quick")


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Semaphore, Event]]:
    """Readings wait: (released by each that begins, go on)."""
    begun, go_on = Semaphore(0), Event()
    survey = wanted.survey_anew

    def wait(folder: Path) -> Any:
        begun.release()
        assert go_on.wait(10)
        return survey(folder)

    monkeypatch.setattr(wanted, "survey_anew", wait)
    yield begun, go_on
    go_on.set()


async def test_an_addition_goes_on_when_its_client_hangs_up(site: Site, reading: tuple[Semaphore, Event]) -> None:
    site.put("new", 5)
    adding = asyncio.create_task(site.post("adapters", name="new", path="new"))
    await asyncio.sleep(0.1)
    adding.cancel()
    reading[1].set()
    await asyncio.sleep(0.2)
    assert "new" in await site.names()


async def test_a_name_that_a_preset_takes_while_an_adapter_is_read_is_the_presets(
    site: Site, reading: tuple[Semaphore, Event]
) -> None:
    site.put("new", 5)
    adding = asyncio.create_task(site.post("adapters", name="new", path="new"))
    await asyncio.sleep(0.1)
    assert (await site.post("presets", name="new", recipe="math")).status_code == 201
    reading[1].set()
    refused(await adding, 409, "'new' is the name of a preset")
    assert (await site.ask("new")).json()["model"].startswith("math@")


async def test_others_are_served_while_an_adapter_is_read(site: Site, reading: tuple[Semaphore, Event]) -> None:
    begun, go_on = reading
    for name in "abcd":
        site.put(name, ord(name))
    adding = [asyncio.create_task(site.post("adapters", name=name, path=name)) for name in "abcd"]
    await asyncio.sleep(0.2)
    assert (await site.ask("math")).status_code == 200
    assert (await site.post("presets", name="tutor", recipe="math")).status_code == 201
    assert begun.acquire(blocking=False)
    assert begun.acquire(blocking=False)
    assert not begun.acquire(blocking=False)  # two at a time
    go_on.set()
    assert {reply.status_code for reply in await asyncio.gather(*adding)} == {201}


async def test_there_are_so_many_adapters_and_no_more(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.adapters.MOST", 1)
    site.put("new", 5)
    assert (await site.post("adapters", name="one", path="new")).status_code == 201
    refused(await site.post("adapters", name="two", path="new"), 409, "1 adapters have been added")
    assert (await site.post("adapters", name="one", path="new")).status_code == 200


async def test_nothing_changes_once_the_server_is_told_to_stop(site: Site) -> None:
    site.put("new", 5)
    await site.app.state.loramix.drain()
    for reply in (
        await site.post("adapters", name="new", path="new"), await site.delete("adapters/math"),
        await site.post("warm", recipe="math"), await site.post("presets", name="x", recipe="math"),
    ):  # fmt: skip
        refused(reply, 503, "being shut down")
        assert reply.headers["retry-after"] == "1"
    assert len((await site.get("adapters"))["data"]) == 3


async def test_an_adapter_whose_folder_is_gone_is_still_listed_and_can_be_deleted(site: Site) -> None:
    shutil.rmtree(site.put("new", 5).parent / "nothing", ignore_errors=True)
    await site.post("adapters", name="new", path="new")
    shutil.rmtree(site.root / "more")
    assert "new" in [card["name"] for card in (await site.get("adapters"))["data"]]
    refused(await site.post("adapters", name="new", path="new"), 400, "no such folder")
    assert (await site.delete("adapters/new")).status_code == 204
