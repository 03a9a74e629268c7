"""Servers killed with all their processes while they write the disk cache: what the next one serves from it is right."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx
import pytest
import torch
from live import LiveServer
from logprobs import TEXT, served_logprobs
from tiny import save_tiny_adapter, tiny_server
from transformers import AutoTokenizer

from server.disk_folder import CacheFolder

TIMES = 50
PLENTY = 2**40
# Of eight adapters, so that merging takes longer than reading what came of it.
REST = "+".join(f"a{number}" for number in range(1, 8))
RECIPES = [f"{method}(a0*{weight}+{REST})" for weight in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2) for method in ("ties-0.5", "dare-0.5")]
KEPT_GIB = 0.006  # a few entries, so that there is always something to write and to evict


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    for seed in range(8):
        save_tiny_adapter(tmp_path / "adapters" / f"a{seed}", seed, rank=16, size=0.4)
    return tmp_path / "adapters"


def headers_of(server: LiveServer, recipe: str) -> httpx.Headers:
    body = {"model": recipe, "prompt": "The", "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().headers


def being_written(cache: Path) -> bool:
    """Whether an entry is being written, or deleted."""
    return any(file.name != "lock" for folder in cache.glob(".server-*") for file in folder.iterdir())


@contextmanager
def asked_for_ever(server: LiveServer, random_: random.Random) -> Iterator[None]:
    """Clients that ask until the server is gone."""

    def ask(recipes: list[str]) -> None:
        try:
            for number in count():
                headers_of(server, recipes[number % len(recipes)])
        except httpx.TransportError:
            return

    with ThreadPoolExecutor() as clients:
        for _ in range(2):
            clients.submit(ask, random_.sample(RECIPES, len(RECIPES)))
        yield


def kill_while_it_writes(server: LiveServer, cache: Path, random_: random.Random) -> None:
    time.sleep(random_.uniform(0, 1))
    deadline = time.monotonic() + 60
    while not being_written(cache):
        assert time.monotonic() < deadline, "it wrote nothing"
        time.sleep(0.0005)
    time.sleep(random_.uniform(0, 0.01))
    server.kill()


@pytest.mark.long  # a start takes half a minute; tests/server/test_disk_killed.py kills a worker without an engine fifty times
def test_servers_killed_while_they_write_leave_nothing_that_is_wrong(tiny: Path, eight: Path, tmp_path: Path) -> None:
    random_, cache = random.Random(0), tmp_path / "cache"
    tokens = AutoTokenizer.from_pretrained(tiny)(TEXT)["input_ids"]

    def start(*options: str) -> LiveServer:
        return tiny_server(tiny, eight, tmp_path / "log", *options, slots=3)

    with start() as reference:
        right = {recipe: served_logprobs(reference, recipe, tokens) for recipe in RECIPES}
        named = {headers_of(reference, recipe)["x-loramix-key"]: recipe for recipe in RECIPES}
    cut_short, read, began = 0, 0, time.monotonic()
    for kills in range(1, TIMES + 1):
        with start("--cache-dir", str(cache), "--cache-disk-gib", str(KEPT_GIB)) as server:
            kept = [named[entry.name.partition(".")[0]] for entry in cache.glob("[0-9a-f]*")]
            for recipe in [*kept, random_.choice(RECIPES)]:
                read += headers_of(server, recipe)["x-loramix-cache"] == "disk"
                assert torch.equal(served_logprobs(server, recipe, tokens), right[recipe]), recipe
            assert server.metric("loramix_disk_reads_total", result="corrupt") == 0
            with asked_for_ever(server, random_):
                kill_while_it_writes(server, cache, random_)
        cut_short += being_written(cache)
        folder = CacheFolder(cache, PLENTY)
        left = folder.keys()
        assert all(folder.read(key) is not None for key in left)  # raises for what is not whole
        minutes = (time.monotonic() - began) / 60
        print(
            f"{kills} kills in {minutes:.1f} min, {cut_short} within an entry; {read} read back, {len(left)} whole now",
            flush=True,
        )
    assert cut_short > TIMES / 5
    assert read > TIMES
