"""Adapters added, replaced, deleted and used at random and at once, beside a model of what each name meant when."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from admin_harness import Site
from harness import settle

from merging import MergeSpec, Term
from server.catalog import Catalog, CatalogEntry
from server.composer import Composer

NAMES, VARIANTS, STEPS = ("x", "y", "z"), 5, 1000


class History:
    """What each name has meant, change by change: digests, or None for no adapter."""

    def __init__(self, catalog: Catalog) -> None:
        self.meant: dict[str, list[str | None]] = {name: [None] for name in NAMES}
        put, remove = catalog.put, catalog.remove

        def watched_put(entry: CatalogEntry) -> None:
            put(entry)
            self.meant[entry.source.name].append(entry.source.digest)

        def watched_remove(name: str) -> None:
            remove(name)
            self.meant[name].append(None)

        catalog.put, catalog.remove = watched_put, watched_remove  # type: ignore[method-assign]

    def since(self, name: str, change: int) -> list[str | None]:
        """What it has meant at any time from that change on."""
        return self.meant[name][change:]

    def now(self, name: str) -> int:
        return len(self.meant[name]) - 1


def key_of(digest: str) -> str:
    return MergeSpec.create("cat", [Term("it", 0.5)]).key({"it": digest}, "bfloat16")


def slow_builds(site: Site, random_: random.Random) -> None:
    build, evict = site.engine.build, site.engine.evict

    async def slow_build(*args: Any) -> Any:
        resident = await build(*args)
        for _ in range(random_.randrange(20)):
            await asyncio.sleep(0)
        return resident

    async def slow_evict(*args: Any) -> None:
        for _ in range(random_.randrange(20)):
            await asyncio.sleep(0)
        await evict(*args)

    site.engine.build, site.engine.evict = slow_build, slow_evict  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_stale_is_served_and_nothing_is_left_behind(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    async with Site(tmp_path, slots=3, adapters=[], adapter_root=[tmp_path / "more"], state_dir=None) as site:
        for variant in range(VARIANTS):
            site.put(f"v{variant}", 30 + variant)
        history = History(site.admin.adapters._catalog)
        slow_builds(site, random_)
        statuses: list[int] = []

        async def use() -> None:
            name = random_.choice(NAMES)
            change = history.now(name)
            reply = await site.ask(f"{name}*0.5")
            statuses.append(reply.status_code)
            meant = history.since(name, change)
            if reply.status_code == 200:
                assert reply.headers["x-loramix-key"] in {key_of(digest) for digest in meant if digest is not None}
            elif reply.status_code == 404:
                assert None in meant
            else:
                assert reply.status_code == 503, reply.text
                assert len(meant) > 1, "refused, though nothing was changed"

        async def add() -> None:
            reply = await site.post("adapters", name=random_.choice(NAMES), path=f"v{random_.randrange(VARIANTS)}")
            assert reply.status_code in (200, 201), reply.text

        async def remove() -> None:
            assert (await site.delete(f"adapters/{random_.choice(NAMES)}")).status_code in (204, 404)

        async def look() -> None:
            changes = {name: history.now(name) for name in NAMES}
            listed = {card["name"]: card["digest"] for card in (await site.get("adapters"))["data"]}
            assert all(listed.get(name) in history.since(name, change) for name, change in changes.items())

        running: set[asyncio.Task[None]] = set()
        streams: list[asyncio.Event] = []
        for _ in range(STEPS):
            running.add(asyncio.create_task(random_.choices((use, add, remove, look), (6, 2, 1, 1))[0]()))
            streams.append(asyncio.Event())
            site.streaming = streams[-1]
            for _ in range(random_.randrange(12)):
                await asyncio.sleep(0)
            for stream in random_.sample(streams, len(streams) // 2):
                stream.set()
                streams.remove(stream)
            if len(running) > 20:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=0.05)
            for task in [task for task in running if task.done()]:
                running.discard(task)
                task.result()
        for stream in streams:
            stream.set()
        await asyncio.gather(*running)
        await settle()
        assert statuses.count(200) > 100
        assert {200, 404} <= set(statuses)
        await check(site, history)


async def check(site: Site, history: History) -> None:
    composer: Composer = site.harness.composer
    assert site.harness.metric("loramix_leases") == site.harness.metric("loramix_waiting_requests") == 0
    assert composer.retired == set()
    there = {key_of(digests[-1]) for digests in history.meant.values() if digests[-1] is not None}
    assert site.engine.resident == set(composer.entries) <= there  # nothing of what no name means is in a slot
    assert site.engine.free == 3 - len(site.engine.resident)
    assert (await site.get("cache"))["slots"]["free"] == site.engine.free
