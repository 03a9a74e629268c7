"""The engine over a stand-in for vLLM's client: ids, the table of requests, and what is cleaned up when a build fails."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from vllm_engine_harness import Bench, vllm_engine

from merging import AdapterError, LoramixError, RecipeError
from server.catalog import Catalog, Recipe
from server.errors import BusyError
from server.grammar import parse_expression


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.engine.setup(1 << 20, 1 << 10, None, 1)
    yield bench
    bench.close()


@pytest.fixture
def math(catalog: Catalog) -> Recipe:
    return catalog.resolve(parse_expression("math*0.5", "cat"))


@pytest.fixture
def code(catalog: Catalog) -> Recipe:
    return catalog.resolve(parse_expression("code", "cat"))


async def settle() -> None:
    """Let reports arrive."""
    await asyncio.sleep(0.05)


def fault(kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"state": "failed", "fault": {"kind": kind, "message": message, "param": param}}


async def test_a_build_is_begun_once_and_done_when_every_worker_has_reported(bench: Bench, math: Recipe) -> None:
    bench.client.hold = True
    building = asyncio.create_task(bench.engine.build(math, None))
    await settle()
    ((job, victim),) = bench.client.made("loramix_begin")
    assert victim is None
    source = math.sources[0]
    assert job["terms"] == [("math", 0.5, str(source.path), source.digest, source.nbytes)]
    assert (job["key"], job["nbytes"], job["request_id"]) == (math.key, math.nbytes, None)
    bench.client.report(0, job["lora_id"])
    await settle()
    assert not building.done()
    assert bench.requests == {}
    bench.client.report(1, job["lora_id"], seconds={"commit": 0.25, "merge": 2.0})
    resident = await asyncio.wait_for(building, 10)
    assert resident.seconds == {"commit": 0.5, "merge": 2.0}  # the slowest worker's
    assert (resident.nbytes, resident.sources, resident.source_bytes) == (10, {"disk": 1}, {"host": 7})
    assert bench.requests[math.name].lora_int_id == resident.lora_id == job["lora_id"]
    assert [method for method, _ in bench.client.calls] == ["loramix_setup", "loramix_begin"]


@pytest.mark.parametrize(
    ("workers", "disk"), [(("hit", "hit"), "hit"), (("hit", "miss"), "miss"), (("hit", None), "miss"), ((None, None), None)]
)
async def test_an_adapter_is_from_disk_where_every_worker_read_it(
    bench: Bench, math: Recipe, workers: tuple[str | None, str | None], disk: str | None
) -> None:
    bench.client.hold = True
    building = asyncio.create_task(bench.engine.build(math, None))
    await settle()
    for worker, found in enumerate(workers):
        phases = {"commit": 0.5, "disk": 0.25} if found == "hit" else {"commit": 0.25, "merge": 2.0}
        bench.client.report(worker, 1, disk=found, seconds=phases)
    resident = await asyncio.wait_for(building, 10)
    assert resident.disk == disk
    assert resident.seconds["commit"] == (0.5 if "hit" in workers else 0.25)
    assert resident.seconds.get("merge") == (None if disk == "hit" else 2.0)


async def test_a_victim_is_off_the_table_before_it_leaves_its_slot(bench: Bench, math: Recipe, code: Recipe) -> None:
    first = await bench.engine.build(math, None)
    bench.client.hold = True
    building = asyncio.create_task(bench.engine.build(code, first))
    await settle()
    assert bench.requests == {}
    job, victim = bench.client.made("loramix_begin")[-1]
    assert victim == first.lora_id
    for worker in (0, 1):
        bench.client.report(worker, job["lora_id"])
    await asyncio.wait_for(building, 10)
    assert list(bench.requests) == [code.name]


async def test_what_is_evicted_is_off_the_table_and_its_id_is_free(bench: Bench, math: Recipe) -> None:
    first = await bench.engine.build(math, None)
    await bench.engine.evict(first)
    assert bench.client.made("loramix_evict") == [(first.lora_id,)]
    assert bench.requests == {}
    assert bench.engine._ids == set()


async def test_an_evicted_copy_takes_a_newer_one_not_off_the_table(bench: Bench, math: Recipe) -> None:
    old, new = await bench.engine.build(math, None), await bench.engine.build(math, None)
    await bench.engine.evict(old)
    assert bench.requests[math.name].lora_int_id == new.lora_id


async def test_forgetting_reaches_every_worker_and_tells_what_is_left(bench: Bench) -> None:
    assert await bench.engine.forget({"0" * 64}) == {"host": 3}
    assert bench.client.made("loramix_forget") == [(["0" * 64],)]


async def test_an_old_copy_that_leaves_takes_the_new_one_not_off_the_table(bench: Bench, math: Recipe, code: Recipe) -> None:
    old, new = await bench.engine.build(math, None), await bench.engine.build(math, None)
    assert old.lora_id != new.lora_id
    await bench.engine.build(code, old)
    assert bench.requests[math.name].lora_int_id == new.lora_id


@pytest.mark.parametrize(
    ("report", "error", "message"),
    [
        (fault("AdapterError", "it changed"), AdapterError, "it changed"),
        (fault("RecipeError", "too many", "adapters"), RecipeError, "too many"),
        (fault("OutOfMemory", "CUDA out of memory. Tried"), BusyError, "no memory left"),
        (fault("KeyError", "KeyError: 'x'"), LoramixError, "the merge failed: KeyError: 'x'"),
    ],
)
async def test_a_failed_build_raises_what_happened_there_and_frees_its_slot_once_all_have_let_go(
    bench: Bench, math: Recipe, report: dict[str, Any], error: type[Exception], message: str
) -> None:
    bench.client.hold = True
    building = asyncio.create_task(bench.engine.build(math, None))
    await settle()
    bench.client.report(0, 1, **report)
    await settle()
    assert not building.done()
    assert bench.client.made("loramix_evict") == []
    bench.client.report(1, 1)
    with pytest.raises(error, match=message):
        await asyncio.wait_for(building, 10)
    assert bench.client.made("loramix_evict") == [(1,)]
    assert bench.requests == {}
    assert bench.engine._ids == set()


async def test_a_cancelled_build_is_dropped_and_ends_when_every_worker_has_let_go(bench: Bench, math: Recipe) -> None:
    bench.client.hold = True
    building = asyncio.create_task(bench.engine.build(math, None))
    await settle()
    building.cancel()
    await settle()
    assert bench.client.made("loramix_drop") == [(1,)]
    bench.client.report(0, 1, state="dropped")
    await settle()
    assert not building.done()
    assert bench.client.made("loramix_evict") == []
    bench.client.report(1, 1)  # was done before it heard of it
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(building, 10)
    assert bench.client.made("loramix_evict") == [(1,)]
    assert bench.requests == {}


async def test_a_build_that_is_cancelled_too_late_frees_its_slot_all_the_same(bench: Bench, math: Recipe) -> None:
    bench.client.hold = True
    building = asyncio.create_task(bench.engine.build(math, None))
    await settle()
    building.cancel()
    for worker in (0, 1):
        bench.client.report(worker, 1)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(building, 10)
    assert bench.client.made("loramix_evict") == [(1,)]
    assert bench.requests == {}
    assert bench.engine._ids == set()


async def test_a_build_that_cannot_begin_fails_and_waits_for_nobody(bench: Bench, math: Recipe) -> None:
    answer = bench.client.collective_rpc

    async def refuse(method: str, args: tuple[Any, ...]) -> list[Any]:
        if method == "loramix_begin":
            raise Exception("Call to loramix_begin failed")  # as vLLM does
        return await answer(method, args)

    bench.client.collective_rpc = refuse  # type: ignore[method-assign]
    with pytest.raises(Exception, match="loramix_begin failed"):
        await asyncio.wait_for(bench.engine.build(math, None), 10)
    assert bench.client.made("loramix_evict") == [(1,)]
    assert bench.engine._ids == set()


async def test_ids_stay_within_32_bits_and_skip_those_in_use(bench: Bench, math: Recipe, code: Recipe) -> None:
    first = await bench.engine.build(math, None)
    bench.engine._last_id = 2**31 - 2
    ids = [(await bench.engine.build(code, None)).lora_id for _ in range(3)]
    assert first.lora_id == 1
    assert ids == [2**31 - 1, 2, 3]


async def test_a_build_ends_when_the_engine_dies_though_no_worker_reports(
    bench: Bench, math: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "_LOOK_SECONDS", 0.01)
    bench.client.hold = True
    build = asyncio.create_task(bench.engine.build(math, None))
    await asyncio.sleep(0.05)
    assert not build.done()
    bench.client.errored = True
    with pytest.raises(BusyError, match="the engine has died, and this server ends"):
        await asyncio.wait_for(build, 5)


async def test_a_call_that_the_engine_died_in_is_not_waited_for(
    bench: Bench, math: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(method: str, args: tuple[Any, ...]) -> list[Any]:
        bench.client.errored = True
        return await asyncio.Event().wait()  # type: ignore[return-value]

    monkeypatch.setattr(vllm_engine, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(bench.client, "collective_rpc", die)
    with pytest.raises(BusyError, match="the engine has died"):
        await asyncio.wait_for(bench.engine.build(math, None), 5)
