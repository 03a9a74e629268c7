"""The end of the engine: what is done before it is shut down, and what is said where it has died."""

import asyncio
from types import SimpleNamespace

import pytest

vllm_shutdown = pytest.importorskip("server.vllm_shutdown", reason="needs vLLM")


async def test_the_engine_is_shut_down_once_all_is_drained() -> None:
    done: list[object] = []
    builds = asyncio.Event()

    async def drain() -> None:
        done.append("draining")
        await builds.wait()
        done.append("drained")

    engine = SimpleNamespace(errored=False, shutdown=lambda timeout: done.append(timeout))
    vllm_shutdown.before_shutdown(engine, drain, 10)
    stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown, timeout=30))
    await asyncio.sleep(0.05)
    assert done == ["draining"]
    builds.set()
    await stopping
    assert done == ["draining", "drained", 30]
    engine.shutdown(timeout=0)  # as vLLM does at its end, on the loop's own thread
    assert done[3:] == [0]


async def test_what_does_not_drain_in_time_does_not_keep_the_engine() -> None:
    done: list[object] = []
    engine = SimpleNamespace(errored=False, shutdown=lambda: done.append("shut down"))
    vllm_shutdown.before_shutdown(engine, asyncio.Event().wait, 0.01)  # type: ignore[arg-type]
    await asyncio.to_thread(engine.shutdown)
    assert done == ["shut down"]


async def test_a_server_whose_engine_has_died_ends_with_1_and_a_line() -> None:
    done: list[object] = []
    engine = SimpleNamespace(errored=True, shutdown=lambda: done.append("shut down"))
    vllm_shutdown.before_shutdown(engine, asyncio.Event().wait, 10)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="the engine has died, so this server ends"):  # a text is printed, with exit code 1
        engine.shutdown()
    assert done == ["shut down"]


async def test_an_engine_that_was_told_to_end_has_not_died() -> None:
    engine = SimpleNamespace(errored=False)
    engine.shutdown = lambda: setattr(engine, "errored", True)  # as vLLM's says of itself from then on
    vllm_shutdown.before_shutdown(engine, lambda: asyncio.sleep(0), 10)  # type: ignore[arg-type, return-value]
    await asyncio.to_thread(engine.shutdown)
    engine.shutdown()
