"""Six replicas under Zipf traffic, the busiest killed in the middle: its streams fail, and nothing else does."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from replicas_harness import URL, Deploy

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray warns of itself

REPLICAS, CLIENTS, MODELS = 6, 24, 200
SECONDS = 20.0


class Traffic:
    """What clients met: answers by tier, streams that ended well by replica, replicas of those that were lost, all else."""

    def __init__(self) -> None:
        self.tiers: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.asked: set[str] = set()
        self.processes: dict[str, int] = {}

    async def ask(self, client: httpx.AsyncClient, model: str) -> None:
        self.asked.add(model)
        body = {"model": model, "prompt": "Once", "max_tokens": 20, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                self.wrong.append(f"{reply.status_code} {(await reply.aread()).decode()}")
                return
            replica = reply.headers["x-loramix-replica"]
            self.processes[replica] = int(reply.headers["x-fake-pid"])
            self.tiers[reply.headers["x-loramix-cache"]] += 1
            lines = [line async for line in reply.aiter_lines() if line]
        (self.ended if lines[-1] == "data: [DONE]" else self.lost)[replica] += 1
        if lines[-1] != "data: [DONE]" and lines[-2] != "event: error":
            self.wrong.append(lines[-1])


def models(seed: int) -> Iterator[str]:
    random = np.random.default_rng(seed)
    weights = np.arange(1, MODELS + 1) ** -1.1
    while True:
        yield f"m{random.choice(MODELS, p=weights / weights.sum())}"


async def test_the_busiest_of_many_is_killed_in_the_middle_of_traffic(deploy: Deploy) -> None:
    await asyncio.to_thread(deploy, REPLICAS, "--max-num-seqs", "16")
    traffic = Traffic()
    async with httpx.AsyncClient(base_url=URL, timeout=60, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        end = asyncio.get_running_loop().time() + SECONDS

        async def asking(seed: int) -> None:
            for model in models(seed):
                if asyncio.get_running_loop().time() > end:
                    return
                await traffic.ask(client, model)

        clients = [asyncio.create_task(asking(seed)) for seed in range(CLIENTS)]
        await asyncio.sleep(SECONDS / 2)
        assert len(traffic.processes) == REPLICAS
        (doomed, _), *_ = traffic.ended.most_common()
        os.kill(traffic.processes[doomed], signal.SIGKILL)
        await asyncio.gather(*clients)
    print(traffic.tiers, traffic.ended, traffic.lost)
    assert not traffic.wrong
    assert set(traffic.lost) <= {doomed}
    assert traffic.lost[doomed] <= 16, "more than it had"
    assert traffic.tiers["merged"] <= len(traffic.asked) * 1.05, "a composition is merged once in the fleet"
    assert traffic.tiers["device"] > 0.3 * traffic.tiers.total()
