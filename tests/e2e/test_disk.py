"""The disk tier of real servers: warm after a restart, shared, damaged; every answer is right."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
from live import LiveServer, serve_command
from logprobs import TEXT, served_logprobs
from transformers import AutoTokenizer

WEIGHTS = "adapter_model.safetensors"
# Two pairs of adapters in turn, where memory is for one: so there is always something to read, and the disk cache is quicker.
HOST_GIB = 0.0105
RECIPES = [recipe for w in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for recipe in (f"svd-8(all*{w}+twin)", f"iso(attn*{w}+mlp)")]

Start = Callable[..., LiveServer]


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]  # type: ignore[no-any-return]


@pytest.fixture
def start(model: Path, adapters: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers, on one folder if they have any; all end with the test."""
    with ExitStack() as stack:

        def begin(*options: str, cached: bool = True) -> LiveServer:
            options = (*options, "--cache-dir", str(tmp_path / "cache")) if cached else options
            fixed = ["--adapters", str(adapters), "--adapter-host-gib", str(HOST_GIB), "--max-loras", "4", "--enforce-eager"]
            log = tmp_path / f"log-{random.randbytes(4).hex()}"
            return stack.enter_context(LiveServer(serve_command(model, *fixed, *options), log))

        yield begin


def asked(server: LiveServer, recipe: str) -> httpx.Headers:
    """What the server says beside its answer."""
    body = {"model": recipe, "prompt": "The", "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().headers


def came_from(server: LiveServer, recipe: str) -> str:
    return asked(server, recipe)["x-loramix-cache"]


def wait_for_writes(server: LiveServer, count: int) -> None:
    deadline = time.monotonic() + 60
    while server.metric("loramix_disk_writes_total", outcome="written") < count:
        assert time.monotonic() < deadline, "it was not written"
        time.sleep(0.1)


def damage(entry: Path) -> None:
    content = bytearray((entry / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / WEIGHTS).write_bytes(content)


def test_servers_share_a_folder_that_outlives_them_and_damage_is_merged_away(
    start: Start, tokens: list[int], tmp_path: Path
) -> None:
    first = start()
    recipes = RECIPES[:2]
    assert [came_from(first, recipe) for recipe in recipes] == ["merged", "merged"]
    wait_for_writes(first, 2)
    right = {recipe: served_logprobs(first, recipe, tokens) for recipe in recipes}
    assert not torch.equal(*right.values())
    assert first.stop() == 0
    entries = sorted((tmp_path / "cache").glob("[0-9a-f]*"))
    assert len(entries) == 2

    second, third = start(), start()
    assert came_from(second, recipes[0]) == "disk"
    assert came_from(second, recipes[0]) == "device"
    assert second.metric("loramix_cache_requests_total", tier="disk", result="hit") == 1
    assert second.metric("loramix_disk_reads_total", result="hit", worker="0") == 1
    assert came_from(second, RECIPES[2]) == "merged"
    wait_for_writes(second, 1)
    assert came_from(third, RECIPES[2]) == "disk"
    for entry in entries:
        damage(entry)
    assert [came_from(third, recipe) for recipe in recipes] == ["merged", "merged"]
    assert third.metric("loramix_disk_reads_total", result="corrupt") == 2
    for recipe in recipes:
        assert torch.equal(served_logprobs(second, recipe, tokens), right[recipe])
        assert torch.equal(served_logprobs(third, recipe, tokens), right[recipe])
