"""Two hundred clients of a real server hang up, while their merge is made or their answer streams: nothing of theirs stays."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live import LiveServer, until
from tiny import save_tiny_adapter, tiny_server

SLOTS = 7
REST = "+".join(f"a{number}" for number in range(1, 16))


@pytest.fixture(scope="module")
def hung_up_on(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Its adapters have 256 units together, for which some methods take a second."""
    root = tmp_path_factory.mktemp("sixteen")
    for seed in range(16):
        save_tiny_adapter(root / f"a{seed}", seed, rank=16, size=0.2)
    with tiny_server(tiny, root, tmp_path_factory.mktemp("hung-up-on") / "log", slots=SLOTS) as server:
        yield server


async def hang_up(url: str, random_: random.Random) -> str:
    """Ask for what takes long to merge, or is there already; leave at a random moment, and say what one waited for then."""
    if random_.random() < 0.5:
        recipe, longest = f"{random_.choice(['svd-8', 'lego-8'])}(a0*{random_.uniform(0.1, 1):.4f}+{REST})", 1.0
    else:
        recipe, longest = f"cat(a{random_.randrange(3)})", 2.0
    body = {"model": recipe, "prompt": "Once", "max_tokens": 450, "ignore_eos": True, "stream": True}
    waited_for = "merge"
    async with httpx.AsyncClient(timeout=60) as client:
        try:
            async with asyncio.timeout(random_.uniform(0, longest)):
                async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
                    assert reply.status_code == 200, await reply.aread()
                    waited_for = "first token"
                    async for _ in reply.aiter_lines():
                        waited_for = "next token"
        except TimeoutError:
            return waited_for
    return "nothing"


async def test_two_hundred_clients_that_hang_up_leave_no_lease_no_build_and_no_slot_behind(hung_up_on: LiveServer) -> None:
    random_, moments = random.Random(0), Counter[str]()

    async def one_after_the_other() -> None:
        for _ in range(25):
            moments[await hang_up(hung_up_on.url, random_)] += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(8)))
    dropped = hung_up_on.metric("loramix_merges_total", outcome="dropped")
    print(f"{dict(moments)}; {dropped:.0f} builds were dropped")
    assert moments["merge"] >= 50
    assert moments["next token"] >= 30
    assert moments["nothing"] < 10
    assert dropped >= 10
    until(hung_up_on.is_idle)
    assert hung_up_on.metric("loramix_merges_total", outcome="error") == 0
    assert hung_up_on.has_slots([f"cat(a{number})" for number in range(SLOTS)])
    until(hung_up_on.is_idle)
    assert hung_up_on.metric("loramix_resident_adapters") == SLOTS
