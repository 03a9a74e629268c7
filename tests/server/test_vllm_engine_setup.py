"""What the engine must find in vLLM before it serves."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from vllm_engine_harness import Bench

from server.errors import ConfigError


@pytest_asyncio.fixture
async def unready() -> AsyncIterator[Bench]:
    """Not set up yet."""
    bench = Bench()
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": "no memory to pin"}, "no memory to pin"),
        ({"host": "elsewhere"}, "a worker runs on elsewhere"),
        ({"modules": {"k_proj": (4, 4)}}, "--pipeline-parallel-size"),
    ],
)
async def test_workers_that_cannot_serve_keep_the_server_from_starting(
    unready: Bench, changes: dict[str, Any], message: str
) -> None:
    unready.client.facts[1].update(changes)
    with pytest.raises(ConfigError, match=message):
        await unready.engine.setup(1, 1, None, 1)


async def test_float16_is_refused_on_the_cpu(unready: Bench) -> None:
    unready.client.vllm_config.model_config.dtype = torch.float16
    with pytest.raises(ConfigError, match=r"spoils others', .*--dtype bfloat16"):
        await unready.engine.setup(1, 1, None, 1)


async def test_float16_is_served_on_a_gpu(unready: Bench) -> None:
    unready.client.vllm_config.model_config.dtype = torch.float16
    unready.client.facts[0]["device"] = "cuda:0"
    assert (await unready.engine.setup(1, 1, None, 1)).device == "cuda:0"


async def test_a_server_without_lora_or_without_the_extension_says_what_to_start_it_with(unready: Bench) -> None:
    async def unknown(method: str, args: tuple[Any, ...]) -> list[Any]:
        raise Exception(f"Call to {method} failed")  # as vLLM does

    unready.client.collective_rpc = unknown  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="--worker-extension-cls"):
        await unready.engine.setup(1, 1, None, 1)
    unready.client.vllm_config.lora_config = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="--enable-lora"):
        await unready.engine.setup(1, 1, None, 1)
