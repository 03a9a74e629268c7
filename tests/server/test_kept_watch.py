"""Servers on one state folder: what one adds, replaces or deletes the others know of, or say why not."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from admin_harness import Site

from server import kept_watch


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Site, Site]]:
    async with AsyncExitStack() as stack:
        sites = [await stack.enter_async_context(Site(tmp_path)) for _ in range(2)]
        for site in sites:
            await site.admin.watch.look()
        yield sites[0], sites[1]


async def key(site: Site, name: str) -> str:
    return (await site.ask(name)).headers["x-loramix-key"]


async def test_what_one_adds_the_other_serves_under_the_same_key(two: tuple[Site, Site]) -> None:
    one, other = two
    one.put("new", 5)
    assert (await one.post("adapters", name="new", path="new")).status_code == 201
    assert (await one.post("presets", name="tutor", recipe="lego-3(new+math*0.5)")).status_code == 201
    assert "new" not in await other.names()
    await other.admin.watch.look()
    assert await other.names() == await one.names()
    assert [await key(other, name) for name in ("new", "tutor")] == [await key(one, name) for name in ("new", "tutor")]
    assert (await other.get("presets")) == (await one.get("presets"))


@pytest.fixture
async def sharing(two: tuple[Site, Site]) -> tuple[Site, Site]:
    """Both have the adapter `new` and the preset `tutor` made of it, which the first has added."""
    one, other = two
    one.put("new", 5)
    await one.post("adapters", name="new", path="new")
    await one.post("presets", name="tutor", recipe="new+math")
    await other.admin.watch.look()
    return two


async def test_what_one_replaces_means_the_same_at_the_other(sharing: tuple[Site, Site]) -> None:
    one, other = sharing
    before = [await key(other, name) for name in ("new", "tutor")]
    one.put("new", 6)
    assert (await one.post("adapters", name="new", path="new")).json()["outcome"] == "replaced"
    await one.post("presets", name="tutor", recipe="new*0.5")
    await other.admin.watch.look()
    after = [await key(other, name) for name in ("new", "tutor")]
    assert after == [await key(one, name) for name in ("new", "tutor")]
    assert not set(before) & set(after)


async def test_what_one_deletes_the_other_forgets(sharing: tuple[Site, Site]) -> None:
    one, other = sharing
    for path in ("presets/tutor", "adapters/new"):
        assert (await one.delete(path)).is_success
    await other.admin.watch.look()
    assert await other.names() == await one.names() == ["tiny", "code", "math", "style"]
    assert (await other.ask("new")).status_code == 404


async def test_either_may_change_what_the_other_has_added(two: tuple[Site, Site]) -> None:
    one, other = two
    one.put("new", 5)
    await one.post("adapters", name="new", path="new")
    await other.admin.watch.look()
    assert (await other.delete("adapters/new")).is_success
    await one.admin.watch.look()
    assert "new" not in await one.names()


async def test_what_cannot_be_used_here_is_left_out_until_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Site(tmp_path) as one, Site(tmp_path, adapter_root=[]) as other:
        one.put("new", 5)
        await one.post("adapters", name="new", path="new")
        await one.post("presets", name="tutor", recipe="new+math")
        await other.admin.watch.look()
        assert "tutor" not in await other.names()
        assert set(other.admin.adapters.skipped) == {"new"}
        assert set(other.admin.presets.skipped) == {"tutor"}
        assert "adapter new, which is kept, is left out" in caplog.text
        folder = one.put("new", 5, under="adapters")
        await one.delete("presets/tutor")
        await one.delete("adapters/new")
        await one.post("adapters", name="new", path=str(folder))
        await one.post("presets", name="tutor", recipe="new+math")
        await other.admin.watch.look()
        assert {"new", "tutor"} <= set(await other.names())
        assert not other.admin.adapters.skipped
        assert not other.admin.presets.skipped


async def test_a_preset_comes_when_its_adapter_does(two: tuple[Site, Site], tmp_path: Path) -> None:
    one, other = two
    folder = one.put("new", 5)
    await one.post("adapters", name="new", path="new")
    await one.post("presets", name="tutor", recipe="new+math")
    away = folder.rename(tmp_path / "away")
    await other.admin.watch.look()
    assert set(other.admin.presets.skipped) == {"tutor"}
    away.rename(folder)
    (tmp_path / "state" / "adapters" / "new.json").touch()
    await other.admin.watch.look()
    assert {"new", "tutor"} <= set(await other.names())


async def test_the_command_line_wins_over_another_server(tmp_path: Path) -> None:
    outside = str(tmp_path / "outside" / "secret")
    async with Site(tmp_path) as one, Site(tmp_path, adapter={"new": outside}, presets={"tutor": "math"}) as other:
        before = [await key(other, name) for name in ("new", "tutor")]
        one.put("new", 5)
        await one.post("adapters", name="new", path="new")
        await one.post("presets", name="tutor", recipe="new")
        await other.admin.watch.look()
        await one.delete("presets/tutor")
        await one.delete("adapters/new")
        await other.admin.watch.look()
        assert [await key(other, name) for name in ("new", "tutor")] == before


async def test_a_damaged_file_and_a_folder_that_is_gone_change_nothing(
    two: tuple[Site, Site], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = two
    await one.post("presets", name="tutor", recipe="math+code")
    await other.admin.watch.look()
    (tmp_path / "state" / "presets" / "tutor.json").write_text("{")
    await other.admin.watch.look()
    assert "damaged" in other.admin.presets.skipped["tutor"]
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    for _ in range(3):
        await other.admin.watch.look()
    assert caplog.text.count("cannot be read") == 1
    assert "tutor" in await other.names()


async def test_it_looks_again_and_again(two: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_watch, "SECONDS", 0.01)
    one, other = two
    watching = asyncio.create_task(other.admin.watch.run())
    await one.post("presets", name="tutor", recipe="math+code")
    async with asyncio.timeout(10):
        while "tutor" not in await other.names():
            await asyncio.to_thread(time.sleep, 0.01)
    watching.cancel()


async def test_a_look_that_fails_is_told_of_once_and_the_next_ones_go_on(
    two: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch, looks, went_on = two[1].admin.watch, 0, asyncio.Event()

    async def look() -> None:
        nonlocal looks
        looks += 1
        if looks < 4:
            raise RuntimeError("nobody foresaw it")
        went_on.set()

    monkeypatch.setattr(kept_watch, "SECONDS", 0)
    monkeypatch.setattr(watch, "look", look)
    monkeypatch.setattr(kept_watch.logger, "propagate", True)
    monkeypatch.setattr(kept_watch.logger.parent, "propagate", True)
    running = asyncio.create_task(watch.run())
    await asyncio.wait_for(went_on.wait(), 10)
    running.cancel()
    assert sum("was not looked at" in record.message for record in caplog.records) == 1
