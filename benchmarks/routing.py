"""How often compositions are where requests are sent, by way of sending them: `python -m benchmarks.routing`.

Ray's own router, as loramix has it, chooses among replicas that only remember what is in their slots; each way gets the same
requests. Popularity is Zipf's; always so many requests run that an even share is half of what a replica runs.
"""

import asyncio
import importlib.metadata
import itertools
import json
import logging
import platform
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from benchmarks.machine import hardware, head
from benchmarks.pictures import draw
from server.scale.router import SessionRouter

FLEETS = (1, 2, 4, 8, 16, 32)
EXPONENTS = (0.8, 1.1)
COMPOSITIONS = 10_000
SLOTS = 16
RUNNING = 32  # requests that a replica takes at a time, Ray's max_ongoing_requests
REQUESTS = 4_000  # for each replica, of which the first half only fills the slots
SEEDS = (0, 1, 2, 3)  # each with a ring and requests of its own; figures are the mean of all
WAYS = ("session", "least busy", "random")
_PARTS = DeploymentID(name="replica")
_ROOT = Path(__file__).parents[1]


@dataclass
class Replica:
    """Slots, the least recently used to leave first; and what Ray's router asks of a replica."""

    replica_id: ReplicaID
    max_ongoing_requests: int = RUNNING

    def __post_init__(self) -> None:
        self.slots: OrderedDict[int, None] = OrderedDict()
        self.running = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.running

    def take(self, composition: int) -> bool:
        """Whether it is in a slot; it is in one from now on."""
        hit = composition in self.slots
        self.slots[composition] = None
        self.slots.move_to_end(composition)
        if len(self.slots) > SLOTS:
            self.slots.popitem(last=False)
        return hit


async def play(way: str, replicas: int, exponent: float, seed: int) -> dict[str, float]:
    """One way of routing: `hits`, the share of requests that find their composition in a slot; `elsewhere`, of those that are
    not sent where the first of their composition was; `most`, that ran at one replica at a time, by an even share."""
    router = SessionRouter(_PARTS, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state(num_fallback_replicas=replicas)
    fleet = [Replica(ReplicaID(f"replica-{seed}-{number}", _PARTS)) for number in range(replicas)]
    router.update_replicas(fleet)
    random = np.random.default_rng(seed)
    weights = np.arange(1, COMPOSITIONS + 1) ** -exponent
    drawn = random.choice(COMPOSITIONS, REQUESTS * replicas, p=weights / weights.sum())
    running: deque[Replica] = deque()
    firsts: dict[int, ReplicaID] = {}
    hits, spilt, most = 0, 0, 0
    for number, composition in enumerate(map(int, drawn)):
        if len(running) == replicas * RUNNING // 2:
            ended = running.popleft()
            ended.running -= 1
            router.decrement_queue_len_cache(ended.replica_id)
        pending = PendingRequest([], {}, _metadata(str(composition) if way == "session" else ""))
        if way == "random":
            chosen = fleet[random.integers(replicas)]
        else:
            chosen = await _routed(router, pending)
        router.on_send_request(chosen.replica_id)
        chosen.running += 1
        running.append(chosen)
        hit = chosen.take(composition)
        first = firsts.setdefault(composition, chosen.replica_id)
        if number >= len(drawn) // 2:
            hits += hit
            spilt += first != chosen.replica_id
            most = max(most, chosen.running)
    counted = len(drawn) - len(drawn) // 2
    return {"hits": hits / counted, "elsewhere": spilt / counted, "most": most / (RUNNING / 2)}


async def _routed(router: Any, pending: PendingRequest) -> Replica:
    """As Ray does: the ranks of candidates in turn, until one of them has room."""
    for _ in range(100):
        for candidates in await router.choose_replicas(router._replicas_list, pending):
            chosen = await router._select_from_candidate_replicas(candidates, 0)
            if chosen is not None:
                return chosen
    raise AssertionError("half of all room is free")


def _metadata(session: str) -> RequestMetadata:
    return RequestMetadata(request_id="", internal_request_id=str(session), session_id=session)


def measure() -> dict[str, float]:
    """Figures by `<way>.zipf<exponent>.<replicas>.<figure>`."""
    figures = {}
    for exponent, replicas, way in itertools.product(EXPONENTS, FLEETS, WAYS):
        runs = [asyncio.run(play(way, replicas, exponent, seed)) for seed in SEEDS]
        for name in runs[0]:
            figures[f"{way}.zipf{exponent}.{replicas}.{name}"] = round(sum(run[name] for run in runs) / len(runs), 4)
        print(
            f"{way}, {replicas} replicas, Zipf {exponent}: {figures[f'{way}.zipf{exponent}.{replicas}.hits']:.3f}", flush=True
        )
    return figures


def plot(figure: Any, record: Mapping[str, Any]) -> bool:
    """Hit rates by replicas, one panel for each exponent."""
    panels = figure.subplots(1, len(EXPONENTS), sharey=True)
    for panel, exponent in zip(panels, EXPONENTS, strict=True):
        for way in WAYS:
            hits = [record["figures"][f"{way}.zipf{exponent}.{replicas}.hits"] for replicas in FLEETS]
            panel.plot(FLEETS, hits, marker="o", label=way)
        panel.set(xscale="log", xticks=FLEETS, xticklabels=FLEETS, xlabel="replicas", title=f"Zipf {exponent}", ylim=(0, 1))
    panels[0].set_ylabel("requests that find their composition in a slot")
    panels[-1].legend()
    return True


if __name__ == "__main__":
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in ("ray", "loramix")}}
    record = head("routing", hardware(torch.device("cpu")), versions, "python -m benchmarks.routing")
    record["figures"] = measure()
    (_ROOT / "benchmarks" / "results" / "routing.json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"{COMPOSITIONS:,} compositions, {SLOTS} slots a replica; Ray Serve {versions['ray']}"
    draw(record, {"hits": plot}, title, 10, _ROOT / "docs" / "routing")
