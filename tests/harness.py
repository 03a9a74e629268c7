"""What the server's unit tests share: tiny adapters, an engine that builds when it is told to, a composer over it,
and a gate in front of merges."""

import asyncio
from collections.abc import Collection, Mapping
from threading import Event
from typing import Any, Literal

import torch
from prometheus_client import CollectorRegistry

from merging import LoraAdapter, LoraModule, merge_into
from server.catalog import Catalog, Recipe
from server.composer import Composer
from server.engine import Resident
from server.grammar import parse_expression
from server.metrics import Metrics

MODULES = {"model.layers.0.q_proj": (12, 8), "model.layers.1.q_proj": (12, 8), "model.layers.0.down_proj": (8, 20)}


def tiny_adapter(rank: int, seed: int, modules: dict[str, tuple[int, int]] = MODULES) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LoraModule(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for name, (d_out, d_in) in modules.items()
    }
    return LoraAdapter(factors, base_model="tiny")


class FakeEngine:
    """Builds finish when the test lets them, unless `hold` is off; remembers everything it was asked.

    A build that is cancelled keeps its slot until the test lets it go, as a worker's thread does.
    """

    def __init__(self, slots: int, hold: bool = False) -> None:
        self.free = slots
        self.hold = hold
        self.disk: Literal["hit", "miss"] | None = None  # what the disk cache says from now on
        self.built: list[str] = []
        self.slots: dict[int, str] = {}  # content key by LoRA id
        self.gates: dict[str, asyncio.Future[None]] = {}
        self.failures: dict[str, BaseException] = {}
        self.hold_evictions: asyncio.Event | None = None  # set it to let evictions go on
        self.forgotten: list[set[str]] = []
        self.dropped: list[asyncio.Future[None]] = []  # builds that were cancelled and have not let go of their slot

    @property
    def resident(self) -> set[str]:
        return set(self.slots.values())

    async def build(self, recipe: Recipe, victim: Resident | None) -> Resident:
        self.built.append(recipe.name)
        lora_id = len(self.built)
        if victim is not None:
            del self.slots[victim.lora_id]
            self.free += 1
        assert self.free > 0, "the composer built into a full engine"
        self.free -= 1
        try:
            if self.hold:
                await self.gates.setdefault(recipe.key, asyncio.get_running_loop().create_future())
            if recipe.key in self.failures:
                raise self.failures.pop(recipe.key)
        except asyncio.CancelledError:
            self.gates.pop(recipe.key, None)
            self.dropped.append(asyncio.get_running_loop().create_future())
            await self.dropped[-1]
            self.free += 1
            raise
        except BaseException:
            self.free += 1
            raise
        self.slots[lora_id] = recipe.key
        seconds = {"commit": 0.001 * lora_id, "load": 0.0, "merge": 0.0}
        return Resident(recipe, lora_id, seconds, 100, {"host": 2, "disk": 1}, self.disk, {"host": 1000 * lora_id})

    async def evict(self, resident: Resident) -> None:
        if self.hold_evictions is not None:
            await self.hold_evictions.wait()
        del self.slots[resident.lora_id]
        self.free += 1

    async def forget(self, digests: Collection[str]) -> Mapping[str, int]:
        self.forgotten.append(set(digests))
        return {"host": 17}

    def finish(self, recipe: Recipe) -> None:
        self.gates.pop(recipe.key).set_result(None)


class Harness:
    """A composer over a FakeEngine, with the catalog to name recipes."""

    def __init__(self, catalog: Catalog, slots: int, hold: bool, timeout: float, **options: Any) -> None:
        self.catalog = catalog
        self.registry = CollectorRegistry()
        self.engine = FakeEngine(slots, hold)
        self.composer = Composer(self.engine, slots, timeout, Metrics(self.registry), **options)

    def recipe(self, expression: str) -> Recipe:
        return self.catalog.resolve(parse_expression(expression, "cat"))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def settle() -> None:
    """Let every task run until all wait for something outside."""
    for _ in range(50):
        await asyncio.sleep(0)


class Gate:
    """In front of every merge into rooms; open until it is closed.

    Attributes:
        begun: set when a merge has come to it. go_on: set while it is open.
    """

    def __init__(self) -> None:
        self.begun, self.go_on = Event(), Event()
        self.go_on.set()

    def close(self) -> None:
        """Have the merges from now on wait; `begun` tells of them alone."""
        self.begun.clear()
        self.go_on.clear()

    def merge_into(self, *args: Any) -> None:
        self.begun.set()
        assert self.go_on.wait(10)
        merge_into(*args)
