"""Servers killed with all their processes while they write the disk cache: what the next one serves from it is right."""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, cycle
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from live import LiveServer
from logprobs import TEXT, served_logprobs
from tiny import save_tiny_adapter, tiny_server
from transformers import AutoTokenizer

from server.disk_folder import CacheFolder

TIMES, PAIR = 50, 2  # two servers at a time share the folder
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


def being_written(cache: Path) -> int:
    """How many servers are writing an entry, or deleting one."""
    return sum(any(file.name != "lock" for file in folder.iterdir()) for folder in cache.glob(".server-*"))


@contextmanager
def asked_for_ever(servers: list[LiveServer], random_: random.Random) -> Iterator[None]:
    """Clients that ask until their server is gone."""

    def ask(server: LiveServer, recipes: list[str]) -> None:
        with suppress(httpx.HTTPError):
            for recipe in cycle(recipes):
                headers_of(server, recipe)

    with ThreadPoolExecutor() as clients:
        for server in servers * 2:
            clients.submit(ask, server, random_.sample(RECIPES, len(RECIPES)))
        yield


def kill_while_one_writes(servers: list[LiveServer], cache: Path, random_: random.Random) -> None:
    """All processes of all servers at once, as when the machine goes down; without a write where none comes in a while.

    Servers read rather than merge as soon as that is quicker, and then there is nothing to write.
    """
    processes = [process for server in servers for process in server.processes()]  # looked for now: it takes long
    time.sleep(random_.uniform(0, 1))
    deadline = time.monotonic() + 20
    while not being_written(cache) and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(random_.uniform(0, 0.01))
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


@pytest.mark.long  # a start takes half a minute; tests/server/test_disk_killed.py kills a worker without an engine fifty times
def test_servers_killed_while_they_write_leave_nothing_that_is_wrong(tiny: Path, eight: Path, tmp_path: Path) -> None:
    random_, cache, numbers = random.Random(0), tmp_path / "cache", count()
    tokens = AutoTokenizer.from_pretrained(tiny)(TEXT)["input_ids"]

    def start(*options: str) -> LiveServer:
        return tiny_server(tiny, eight, tmp_path / f"log{next(numbers)}", *options, slots=3)

    with start() as reference:
        right = {recipe: served_logprobs(reference, recipe, tokens) for recipe in RECIPES}
        named = {headers_of(reference, recipe)["x-loramix-key"]: recipe for recipe in RECIPES}

    def read_back(server: LiveServer) -> int:
        """How many answers came from the disk; every answer is right."""
        kept = [named[entry.name.partition(".")[0]] for entry in cache.glob("[0-9a-f]*")]
        read = 0
        for recipe in [*kept, RECIPES[0]]:
            read += headers_of(server, recipe)["x-loramix-cache"] == "disk"
            assert torch.equal(served_logprobs(server, recipe, tokens), right[recipe]), recipe
        assert server.metric("loramix_disk_reads_total", result="corrupt") == 0
        return read

    cut_short, read, began = 0, 0, time.monotonic()
    for kills in range(PAIR, TIMES + 1, PAIR):
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            new = [start("--cache-dir", str(cache), "--cache-disk-gib", str(KEPT_GIB)) for _ in range(PAIR)]
            servers = list(pool.map(stack.enter_context, new))
            read += sum(pool.map(read_back, servers))
            with asked_for_ever(servers, random_):
                kill_while_one_writes(servers, cache, random_)
        cut_short += being_written(cache)
        folder = CacheFolder(cache, PLENTY)
        left = folder.keys()
        assert all(folder.read(key) is not None for key in left)  # raises for what is not whole
        spent = (time.monotonic() - began) / 60
        print(f"{kills} kills, {spent:.1f} min; {cut_short} within an entry; {read} read, {len(left)} there", flush=True)
    assert cut_short > TIMES / 5
    assert read > TIMES
