"""The composer: one build a key, leases that hold, eviction of the longest unused, order among those who wait."""

import asyncio
import random
from collections.abc import Callable

import pytest
from harness import Harness, settle

from merging import AdapterError
from server.errors import BusyError, OutOfMemoryError
from server.lease import Lease

MakeHarness = Callable[..., Harness]


async def test_a_hundred_equal_requests_at_once_make_one_merge(make_harness: MakeHarness) -> None:
    harness = make_harness(hold=True)
    recipe = harness.recipe("math+code")
    waiting = [asyncio.create_task(harness.composer.ensure(recipe, "client")) for _ in range(100)]
    await settle()
    assert harness.metric("loramix_waiting_requests") == 100
    harness.engine.finish(recipe)
    leases = await asyncio.gather(*waiting)
    assert harness.engine.built == [recipe.name]
    assert {lease.tier for lease in leases} == {"merged"}
    assert all(lease.waited_ms > 0 for lease in leases)
    assert harness.metric("loramix_leases") == 100
    for lease in leases:
        lease.release()
    assert harness.metric("loramix_leases") == harness.metric("loramix_waiting_requests") == 0
    assert harness.metric("loramix_merges_total", method="cat", outcome="ok") == 1


async def test_a_resident_adapter_is_not_built_again(make_harness: MakeHarness) -> None:
    harness = make_harness()
    (await harness.composer.ensure(harness.recipe("math+code"), "client")).release()
    lease = await harness.composer.ensure(harness.recipe("code+math"), "client")
    assert (lease.tier, lease.waited_ms) == ("device", 0)
    assert len(harness.engine.built) == 1
    assert harness.metric("loramix_cache_requests_total", tier="device", result="hit") == 1
    assert harness.metric("loramix_cache_requests_total", tier="device", result="miss") == 1


async def test_where_an_adapter_came_from_is_told_and_counted(make_harness: MakeHarness) -> None:
    harness = make_harness()
    tiers = []
    for name, disk in (("math", "hit"), ("code", "miss"), ("style", None)):
        harness.engine.disk = disk
        lease = await harness.composer.ensure(harness.recipe(name), "client")
        tiers.append(lease.tier)
        lease.release()
    assert tiers == ["disk", "merged", "merged"]
    assert harness.metric("loramix_cache_requests_total", tier="disk", result="hit") == 1
    assert harness.metric("loramix_cache_requests_total", tier="disk", result="miss") == 1
    assert (await harness.composer.ensure(harness.recipe("style"), "client")).tier == "device"


async def test_the_one_whose_last_lease_ended_longest_ago_is_evicted(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=2)
    math = await harness.composer.ensure(harness.recipe("math"), "client")
    (await harness.composer.ensure(harness.recipe("code"), "client")).release()
    math.release()
    (await harness.composer.ensure(harness.recipe("style"), "client")).release()
    assert harness.engine.resident == {harness.recipe("math").key, harness.recipe("style").key}
    assert harness.metric("loramix_evictions_total") == 1
    assert harness.metric("loramix_resident_adapters", method="cat") == 2
    assert harness.metric("loramix_resident_bytes") == 200


async def test_what_is_leased_is_never_evicted_and_others_wait_in_order(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1)
    first = await harness.composer.ensure(harness.recipe("math"), "client")
    second = asyncio.create_task(harness.composer.ensure(harness.recipe("code"), "client"))
    await settle()
    third = asyncio.create_task(harness.composer.ensure(harness.recipe("style"), "client"))
    await settle()
    assert harness.engine.resident == {harness.recipe("math").key}
    first.release()
    lease = await second
    await settle()
    assert not third.done()
    lease.release()
    (await third).release()
    assert harness.engine.built == [harness.recipe(name).name for name in ("math", "code", "style")]


async def test_what_is_asked_for_while_it_leaves_its_slot_is_built_anew(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=2)
    for name in ("math", "code"):
        (await harness.composer.ensure(harness.recipe(name), "client")).release()
    harness.engine.hold = True
    replacing = asyncio.create_task(harness.composer.ensure(harness.recipe("style"), "client"))  # in the slot of math
    await settle()
    again = asyncio.create_task(harness.composer.ensure(harness.recipe("math"), "client"))  # in the slot of code
    await settle()
    harness.engine.finish(harness.recipe("math"))
    assert (await again).tier == "merged"
    harness.engine.finish(harness.recipe("style"))
    await replacing
    assert harness.engine.slots == {4: harness.recipe("math").key, 3: harness.recipe("style").key}


async def test_releasing_twice_gives_up_one_lease(make_harness: MakeHarness) -> None:
    harness = make_harness()
    recipe = harness.recipe("math")
    one, other = await harness.composer.ensure(recipe, "client"), await harness.composer.ensure(recipe, "client")
    one.release()
    one.release()
    assert harness.metric("loramix_leases") == 1
    other.release()
    assert harness.metric("loramix_leases") == 0


async def test_a_failed_build_reaches_all_who_wait_and_the_next_request_tries_again(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, hold=True)
    recipe = harness.recipe("math")
    harness.engine.failures[recipe.key] = AdapterError("broken")
    waiting = [asyncio.create_task(harness.composer.ensure(recipe, "client")) for _ in range(3)]
    await settle()
    harness.engine.finish(recipe)
    for task in waiting:
        with pytest.raises(AdapterError, match="broken"):
            await task
    assert harness.metric("loramix_leases") == 0
    assert harness.metric("loramix_merges_total", method="cat", outcome="error") == 1
    harness.engine.hold = False
    assert (await harness.composer.ensure(recipe, "client")).tier == "merged"


async def test_a_failed_build_frees_the_slot_that_was_taken_for_it(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1)
    (await harness.composer.ensure(harness.recipe("math"), "client")).release()
    bad = harness.recipe("code")
    harness.engine.failures[bad.key] = AdapterError("broken")
    with pytest.raises(AdapterError):
        await harness.composer.ensure(bad, "client")
    assert harness.engine.free == 1
    (await harness.composer.ensure(harness.recipe("style"), "client")).release()
    assert harness.engine.resident == {harness.recipe("style").key}


async def test_a_failed_build_hands_its_slot_to_the_next_in_line(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, hold=True)
    bad, good = harness.recipe("math"), harness.recipe("code")
    harness.engine.failures[bad.key] = AdapterError("broken")
    failing = asyncio.create_task(harness.composer.ensure(bad, "client"))
    await settle()
    waiting = asyncio.create_task(harness.composer.ensure(good, "client"))
    await settle()
    harness.engine.finish(bad)
    with pytest.raises(AdapterError):
        await failing
    await settle()
    harness.engine.finish(good)
    assert (await waiting).key == good.key


async def test_a_wait_that_is_too_long_ends_with_busy_and_leaves_no_lease(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, timeout=0.01)
    holder = await harness.composer.ensure(harness.recipe("math"), "client")
    with pytest.raises(BusyError, match=r"0\.01 s"):
        await harness.composer.ensure(harness.recipe("code"), "client")
    assert harness.metric("loramix_leases") == 1
    holder.release()
    await settle()
    assert harness.engine.built == [harness.recipe("math").name]  # nobody waits for code any more
    (await harness.composer.ensure(harness.recipe("code"), "client")).release()
    assert harness.engine.resident == {harness.recipe("code").key}


async def test_a_build_that_nobody_waits_for_any_more_is_dropped(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, hold=True)
    left, next_in_line = harness.recipe("math"), harness.recipe("code")
    leaving = [asyncio.create_task(harness.composer.ensure(left, "client")) for _ in range(2)]
    await settle()
    waiting = asyncio.create_task(harness.composer.ensure(next_in_line, "client"))
    await settle()
    leaving[0].cancel()
    await settle()
    assert not harness.engine.dropped  # one still waits
    leaving[1].cancel()
    await settle()
    assert len(harness.engine.dropped) == 1
    assert harness.engine.built == [left.name]  # the worker still writes the slot
    harness.engine.dropped[0].set_result(None)
    await settle()
    harness.engine.finish(next_in_line)
    assert (await waiting).key == next_in_line.key
    assert harness.metric("loramix_merges_total", method="cat", outcome="dropped") == 1
    assert harness.metric("loramix_merges_total", method="cat", outcome="error") == 0
    assert harness.metric("loramix_leases") == 1


async def test_what_is_asked_for_while_its_dropped_build_lets_go_is_built_anew(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=2, hold=True)
    recipe = harness.recipe("math")
    leaving = asyncio.create_task(harness.composer.ensure(recipe, "client"))
    await settle()
    leaving.cancel()
    await settle()
    again = asyncio.create_task(harness.composer.ensure(recipe, "client"))
    await settle()
    harness.engine.finish(recipe)
    assert (await again).tier == "merged"
    harness.engine.dropped[0].set_result(None)
    await settle()
    assert harness.engine.slots == {2: recipe.key}
    assert (await harness.composer.ensure(recipe, "client")).tier == "device"  # the end of the old build took nothing away


async def test_one_who_leaves_the_line_for_a_slot_takes_none(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1)
    holder = await harness.composer.ensure(harness.recipe("math"), "client")
    leaving, staying = (
        asyncio.create_task(harness.composer.ensure(harness.recipe(name), "client")) for name in ("code", "style")
    )
    await settle()
    leaving.cancel()
    await settle()
    holder.release()
    assert (await staying).key == harness.recipe("style").key


async def test_one_who_leaves_as_its_turn_comes_hands_the_slot_on(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1)
    holder = await harness.composer.ensure(harness.recipe("math"), "client")
    leaving, staying = (
        asyncio.create_task(harness.composer.ensure(harness.recipe(name), "client")) for name in ("code", "style")
    )
    await settle()
    entry = harness.composer._entries[harness.recipe("code").key]
    holder.release()  # code has the slot of math now, and has not run since
    entry.build.cancel()
    leaving.cancel()
    assert (await staying).key == harness.recipe("style").key
    assert harness.engine.built == [harness.recipe("math").name, harness.recipe("style").name]
    assert harness.engine.resident == {harness.recipe("style").key}
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_a_merge_without_memory_is_busy_and_counted(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1)
    recipe = harness.recipe("math")
    harness.engine.failures[recipe.key] = OutOfMemoryError("no memory left")
    with pytest.raises(BusyError, match="no memory left"):
        await harness.composer.ensure(recipe, "client")
    assert harness.metric("loramix_merges_total", method="cat", outcome="oom") == 1
    assert (await harness.composer.ensure(recipe, "client")).tier == "merged"


async def test_builds_tell_where_their_sources_were_and_the_longest_commit(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1)
    for name in ("math", "code", "style"):
        (await harness.composer.ensure(harness.recipe(name), "client")).release()
    assert harness.metric("loramix_source_requests_total", tier="host") == 6
    assert harness.metric("loramix_source_requests_total", tier="disk") == 3
    assert harness.metric("loramix_source_bytes", tier="host") == 3000
    assert harness.metric("loramix_commit_seconds_max") == 0.003
    assert harness.metric("loramix_merge_seconds_count", method="cat", phase="commit") == 3


async def test_a_cancelled_request_does_not_cancel_the_build_of_the_others(make_harness: MakeHarness) -> None:
    harness = make_harness(hold=True)
    recipe = harness.recipe("math")
    leaving, staying = (asyncio.create_task(harness.composer.ensure(recipe, "client")) for _ in range(2))
    await settle()
    leaving.cancel()
    await settle()
    harness.engine.finish(recipe)
    assert (await staying).tier == "merged"
    assert harness.metric("loramix_leases") == 1


@pytest.mark.parametrize("seed", range(10))
async def test_under_random_traffic_every_request_is_served_and_nothing_leaks(make_harness: MakeHarness, seed: int) -> None:
    harness = make_harness(slots=3)
    random_ = random.Random(seed)
    recipes = [harness.recipe(f"math*{weight / 10}") for weight in range(1, 12)]

    async def client() -> None:
        for _ in range(20):
            recipe = random_.choice(recipes)
            lease: Lease = await harness.composer.ensure(recipe, "client")
            for _ in range(random_.randrange(4)):
                await asyncio.sleep(0)
                assert recipe.key in harness.engine.resident, "evicted under a lease"
            lease.release()

    await asyncio.gather(*(client() for _ in range(12)))
    assert harness.metric("loramix_leases") == harness.metric("loramix_waiting_requests") == 0
    assert harness.engine.free == 3 - len(harness.engine.resident)
    assert harness.metric("loramix_resident_adapters", method="cat") == len(harness.engine.resident)
