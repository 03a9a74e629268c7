"""Admission: no client can push out, hold up or crowd out the others; and nothing is left behind by any of it."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest
from harness import Harness, settle

from merging import AdapterError, LoramixError
from server.errors import BusyError, OverloadedError, RateLimitedError
from server.lease import Lease
from server.slots import KEPT_SECONDS

MakeHarness = Callable[..., Harness]
POLITE = {name: [f"code*{100 * number + which}e-4" for which in (1, 2)] for number, name in enumerate(("ann", "bob", "cid"), 1)}


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def use(harness: Harness, expression: str, client: str) -> str:
    """Have it used for a moment; where it came from."""
    lease = await harness.composer.ensure(harness.recipe(expression), client)
    lease.release()
    return lease.tier


def ask(harness: Harness, expression: str, client: str) -> asyncio.Task[Lease]:
    return asyncio.create_task(harness.composer.ensure(harness.recipe(expression), client))


def holds_nothing(harness: Harness, slots: int) -> bool:
    """Whether no lease and no wait is left, and every slot is either free or has something resident in it."""
    inner = harness.composer._slots
    return (
        harness.metric("loramix_leases") == harness.metric("loramix_waiting_requests") == 0
        and harness.metric("loramix_merge_queue_length") == len(inner._line) == 0
        and len(inner._taken) == len(harness.composer._entries) == harness.metric("loramix_resident_adapters", method="cat")
        and len(inner._free) + len(inner._taken) == slots
        and not any(entry.leases for entry in inner._taken)
    )


async def polite_hits(harness: Harness, name_of: Callable[[str], str]) -> float:
    """The share of hits of three clients with two compositions each, once warm, beside one that asks for 2000 others."""
    random_ = random.Random(0)
    for client, expressions in POLITE.items():
        for expression in expressions:
            await use(harness, expression, name_of(client))
    tiers: Counter[str] = Counter()
    for number in range(1, 2001):
        await use(harness, f"math*{number}e-4", name_of("flooder"))
        if number % 10 == 0:
            client = random_.choice(sorted(POLITE))
            tiers[await use(harness, random_.choice(POLITE[client]), name_of(client))] += 1
    assert holds_nothing(harness, slots=8)
    return tiers["device"] / tiers.total()


async def test_one_client_with_random_weights_cannot_evict_everybody_elses_compositions(make_harness: MakeHarness) -> None:
    assert await polite_hits(make_harness(slots=8, clock=Clock()), lambda client: client) == 1.0


async def test_under_one_name_for_all_which_is_plain_lru_it_could(make_harness: MakeHarness) -> None:
    assert await polite_hits(make_harness(slots=8, clock=Clock()), lambda _: "everybody") < 0.1


async def test_nor_can_it_with_many_streams_at_once(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=8, clock=Clock())
    for client, expressions in POLITE.items():
        for expression in expressions:
            await use(harness, expression, client)
    flood = [ask(harness, f"math*{number}e-4", "flooder") for number in range(1, 31)]
    await settle()
    assert sum(task.done() for task in flood) == 2  # what the others leave; the rest waits for these
    for client, expressions in POLITE.items():
        assert [await use(harness, expression, client) for expression in expressions] == ["device", "device"]
    for task in flood:
        (await task).release()
    for client, expressions in POLITE.items():
        assert [await use(harness, expression, client) for expression in expressions] == ["device", "device"]
    assert holds_nothing(harness, slots=8)


async def test_nor_by_leaving_before_its_merges_are_done(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=4, clock=Clock())
    for expression in ("code*1e-4", "code*2e-4"):
        await use(harness, expression, "ann")
    harness.engine.hold = True
    for number in range(1, 10):  # those that are dropped keep their slot until the worker lets go of it
        leaving = ask(harness, f"math*{number}e-4", "flooder")
        await settle()
        leaving.cancel()
        await settle()
    assert await use(harness, "code*1e-4", "ann") == await use(harness, "code*2e-4", "ann") == "device"
    assert len(harness.engine.dropped) == 2
    for dropped in harness.engine.dropped:
        dropped.set_result(None)
    await settle()
    assert holds_nothing(harness, slots=4)


async def test_a_client_alone_has_all_slots(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=4, clock=Clock())
    leases = [await harness.composer.ensure(harness.recipe(f"math*{number}e-4"), "ann") for number in range(1, 5)]
    assert len(harness.engine.resident) == 4
    for lease in leases:
        lease.release()
    assert holds_nothing(harness, slots=4)


async def test_what_a_client_has_not_used_for_a_while_is_lent_to_others(make_harness: MakeHarness) -> None:
    clock = Clock()
    harness = make_harness(slots=4, clock=clock)
    for number in range(1, 5):
        await use(harness, f"code*{number}e-4", "gone")
    clock.now += KEPT_SECONDS
    for number in range(1, 5):
        await use(harness, f"math*{number}e-4", "ann")
    assert harness.engine.resident == {harness.recipe(f"math*{number}e-4").key for number in range(1, 5)}


async def test_a_lease_counts_for_its_client_however_long_it_lasts(make_harness: MakeHarness) -> None:
    clock = Clock()
    harness = make_harness(slots=3, clock=clock)
    streams = [await harness.composer.ensure(harness.recipe(f"math*{number}e-4"), "flooder") for number in (1, 2)]
    clock.now += 10 * KEPT_SECONDS
    await use(harness, "code", "ann")
    third = ask(harness, "math*3e-4", "flooder")
    await settle()
    assert not third.done()
    assert await use(harness, "code", "ann") == "device"
    streams[0].release()
    (await third).release()
    streams[1].release()
    assert await use(harness, "code", "ann") == "device"


async def test_a_slot_goes_to_who_has_least_not_to_who_waits_most(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=2)
    streams = [await harness.composer.ensure(harness.recipe(f"math*{number}e-4"), "flooder") for number in (1, 2)]
    flood = [ask(harness, f"math*{number}e-4", "flooder") for number in range(3, 20)]
    await settle()
    ann, bob = ask(harness, "code", "ann"), ask(harness, "style", "bob")
    await settle()
    streams[0].release()
    (await ann).release()  # bob has had as little as ann, and comes next
    (await bob).release()
    streams[1].release()
    served = []
    for task in flood:
        lease = await task
        served.append(lease.name)
        lease.release()
    assert served == [harness.recipe(f"math*{number}e-4").name for number in range(3, 20)]
    assert harness.engine.built[2:4] == [harness.recipe("code").name, harness.recipe("style").name]
    assert holds_nothing(harness, slots=2)


async def test_more_merges_than_may_wait_are_refused_at_once(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, longest_line=2)
    holder = await harness.composer.ensure(harness.recipe("math"), "ann")
    waiting = [ask(harness, f"math*{number}e-4", "ann") for number in (1, 2)]
    await settle()
    with pytest.raises(OverloadedError, match="2 merges wait"):
        await harness.composer.ensure(harness.recipe("math*3e-4"), "ann")
    assert harness.metric("loramix_merge_queue_length") == 2
    assert harness.metric("loramix_merges_total", method="cat", outcome="refused") == 1
    joined = ask(harness, "math*1e-4", "ann")  # is no further merge
    await settle()
    holder.release()
    for task in (joined, *waiting):
        (await task).release()
    assert holds_nothing(harness, slots=1)


async def test_a_full_line_refuses_who_fills_it_and_takes_in_the_others(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, longest_line=3)
    holder = await harness.composer.ensure(harness.recipe("math"), "flooder")
    flood = [ask(harness, f"math*{number}e-4", "flooder") for number in (1, 2, 3)]
    await settle()
    ann = ask(harness, "code", "ann")
    await settle()
    with pytest.raises(OverloadedError):
        await flood[2]
    holder.release()
    for task in (ann, *flood[:2]):
        (await task).release()
    assert holds_nothing(harness, slots=1)


async def test_a_wait_that_ends_leaves_the_line(make_harness: MakeHarness) -> None:
    harness = make_harness(slots=1, timeout=0.01, longest_line=1)
    holder = await harness.composer.ensure(harness.recipe("math"), "ann")
    for _ in range(3):
        with pytest.raises(BusyError, match="not ready within"):
            await harness.composer.ensure(harness.recipe("code"), "ann")
        await settle()
        assert harness.metric("loramix_merge_queue_length") == 0
    holder.release()
    assert holds_nothing(harness, slots=1)


async def test_merges_of_one_client_are_limited_and_everything_else_is_free(make_harness: MakeHarness) -> None:
    clock = Clock()
    harness = make_harness(slots=8, builds_per_minute=2, clock=clock)
    for name in ("math", "code"):
        assert await use(harness, name, "ann") == "merged"
    with pytest.raises(RateLimitedError) as refused:
        await use(harness, "style", "ann")
    assert refused.value.retry_after == 30
    assert await use(harness, "math", "ann") == "device"
    assert await use(harness, "style", "bob") == "merged"
    assert await use(harness, "style", "ann") == "device"
    clock.now += 30
    assert await use(harness, "math+code", "ann") == "merged"
    with pytest.raises(RateLimitedError):
        await use(harness, "math+style", "ann")
    assert holds_nothing(harness, slots=8)


async def test_joining_a_merge_that_another_began_is_free(make_harness: MakeHarness) -> None:
    harness = make_harness(hold=True, builds_per_minute=1, clock=Clock())
    first, joined = ask(harness, "math", "ann"), ask(harness, "math", "bob")
    await settle()
    harness.engine.finish(harness.recipe("math"))
    (await first).release()
    (await joined).release()
    harness.engine.hold = False
    assert await use(harness, "code", "bob") == "merged"


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_clients_do_every_wait_ends_and_nothing_is_left_behind(make_harness: MakeHarness, seed: int) -> None:
    """Clients that share recipes, leave in the middle, hold several at once, meet failing merges and a short line."""
    clock = Clock()
    harness = make_harness(slots=3, hold=True, longest_line=2, builds_per_minute=25, clock=clock)
    random_ = random.Random(seed)
    recipes = [harness.recipe(f"math*{number}e-1") for number in range(1, 16)]
    outcomes: Counter[str] = Counter()
    done = False

    async def engine() -> None:
        """Merges end, some of them badly, and dropped ones let go."""
        while not done:
            for key, gate in list(harness.engine.gates.items()):
                if random_.random() < 0.1:
                    if random_.random() < 0.2:
                        harness.engine.failures[key] = AdapterError("broken")
                    gate.set_result(None)
                    del harness.engine.gates[key]
            for dropped in harness.engine.dropped:
                if not dropped.done() and random_.random() < 0.3:
                    dropped.set_result(None)
            clock.now += random_.random() / 5
            await asyncio.sleep(0)

    async def request(client: str) -> None:
        recipe = random_.choice(recipes)
        task = asyncio.create_task(harness.composer.ensure(recipe, client))
        for _ in range(random_.randrange(60)):
            await asyncio.sleep(0)
        if random_.random() < 0.2:
            task.cancel()
        try:
            lease = await task
        except asyncio.CancelledError:
            outcomes["left"] += 1
        except LoramixError as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["served"] += 1
            for _ in range(random_.randrange(10)):
                await asyncio.sleep(0)
                assert recipe.key in harness.engine.resident, "evicted under a lease"
            lease.release()

    async def client(name: str, at_once: int) -> None:
        for _ in range(40):
            await asyncio.gather(*(request(name) for _ in range(at_once)))

    engine_task = asyncio.create_task(engine())
    await asyncio.wait_for(asyncio.gather(client("ann", 1), client("bob", 1), client("cid", 2), client("flooder", 6)), 60)
    for _ in range(200):
        await asyncio.sleep(0)
    done = True
    await engine_task
    assert holds_nothing(harness, slots=3)
    assert harness.engine.free == 3 - len(harness.engine.resident)
    assert outcomes.total() == 40 * 10
    kinds = {"served", "left", "AdapterError", "OverloadedError", "RateLimitedError"}
    assert set(outcomes) == kinds, "the traffic was too tame"
