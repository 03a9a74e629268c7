"""Which fleets are simulated, under which traffic; each a scenario of its own, with a name that its figures begin with."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.fleet.costs import Costs
from benchmarks.fleet.routing import ROUTERS
from benchmarks.fleet.simulate import Fleet, simulate
from benchmarks.fleet.traffic import Population, traffic
from benchmarks.serving.parts import ZIPF_EXPONENT, ZIPF_TOKENS
from benchmarks.serving.stage import SCALES

EXPONENTS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
FEW = (1, 2, 4, 8, 16, 32)
MANY = (10, 30, 100, 300, 1000)
LARGE = ("random", "full", "mean", "ray")  # routers of those
LOAD = 0.5  # of a replica's warm capacity
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SLOTS = (8, 16, 32, 64, 128)
BASE = Fleet(replicas=32, router="full", slots=32, device=25, host=204, folder=131_072)
"""Of 80 MiB: 2.5 GiB of slots, 2 GiB of sources on the GPU, 16 GiB in host memory, 10 TiB of merged adapters in the folder."""
STORAGES = {
    "none": replace(BASE, folder=0),
    "own": replace(BASE, folder=0, own_disk=3277),
    "folder": BASE,
    "both": replace(BASE, own_disk=3277),
}
"""Disk caches: none, 256 GiB of each replica's own, the shared folder, and both."""
QUICKER = SLOWER = 4.0
HOSTS = (51, 204, 819, 3277)
"""Adapters in a replica's host memory: 4, 16, 64 and 256 GiB."""
NEW_PER_HOUR = (1_000, 10_000, 100_000)
FLASH = 0.1
SEEDS = 5
_MEASURED = SCALES["cuda"]


@dataclass(frozen=True)
class Scenario:
    """One simulation.

    Attributes:
        load: requests, as a share of what all replicas could serve if all were warm.
        warm: the share of requests that come before any counts.
        quicker: how many times quicker adapters are read than was measured.
    """

    name: str
    fleet: Fleet
    requests: int
    load: float = LOAD
    population: Population = field(default_factory=Population)
    new_per_hour: float = 0.0
    flash_share: float = 0.0
    seed: int = 0
    warm: float = 0.5
    quicker: float = 1.0

    def run(self, costs: Costs) -> dict[str, float]:
        """Its figures, without its name."""
        rate = self.load * self.fleet.replicas * costs.capacity(self.fleet.tokens)
        asked = traffic(
            self.population, self.requests, rate, self.seed, new_per_hour=self.new_per_hour, flash_share=self.flash_share,
            flash_from=self.warm,
        )  # fmt: skip
        reading = replace(costs, read_seconds=costs.read_seconds / self.quicker)
        return simulate(self.fleet, reading, asked, warm=self.warm, seed=self.seed).figures


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        per_replica, least: requests. filling: those for each replica where large caches fill.
        many: replicas of the large fleets.
    """

    population: Population
    per_replica: int
    least: int
    filling: int
    many: tuple[int, ...]

    def requests(self, fleet: Fleet) -> int:
        return max(self.least, self.per_replica * fleet.replicas)


FULL = Sizes(Population(), per_replica=300, least=30_000, filling=3_000, many=MANY)
QUICK = Sizes(Population(adapters=1_000, compositions=10_000), per_replica=10, least=500, filling=20, many=MANY[:2])


def scenarios(sizes: Sizes) -> Iterator[Scenario]:
    """All of them, the largest first, so that they end together."""

    def of(name: str, fleet: Fleet, **options: Any) -> Scenario:
        requests = options.pop("requests", sizes.requests(fleet))
        return Scenario(name, fleet, requests, **{"population": sizes.population, **options})

    for count in reversed(sizes.many):
        for router in LARGE:
            yield of(f"fleet.{count}.{router}", replace(BASE, replicas=count, router=router))
    filling = sizes.filling * BASE.replicas
    for load in LOADS:
        for name, fleet in STORAGES.items():
            yield of(f"storage.{name}.{load:g}", fleet, load=load, requests=filling)
        yield of(f"storage.quicker.{load:g}", BASE, load=load, requests=filling, quicker=QUICKER)
    for host in HOSTS:
        yield of(f"host.{host}", replace(BASE, host=host), requests=filling)
    yield of("longer", BASE, requests=3 * sizes.requests(BASE))
    for router in ROUTERS:
        fleet = replace(BASE, router=router)
        for few in FEW:
            yield of(f"routing.{few}.{router}", replace(fleet, replicas=few))
        for exponent in EXPONENTS:
            skewed = replace(sizes.population, exponent=exponent)
            yield of(f"exponent.{exponent:g}.{router}", fleet, population=skewed)
        for load in LOADS:
            yield of(f"load.{load:g}.{router}", fleet, load=load)
        yield of(f"flash.{router}", fleet, flash_share=FLASH)
    for slots in SLOTS:
        for router in ("random", "full"):
            yield of(f"slots.{slots}.{router}", replace(BASE, slots=slots, router=router))
    for new in NEW_PER_HOUR:
        yield of(f"new.{new}", BASE, new_per_hour=new)
    for seed in range(SEEDS):
        yield measured(seed)
        yield replace(measured(seed), name=f"slow.{seed}", quicker=1 / SLOWER)


def measured(seed: int, requests: int = 1080) -> Scenario:
    """What `loramix bench serve --part zipf` measured on a real server, from its start on: clients without pauses.

    Args:
        requests: as many as it served then.
    """
    population = Population(
        adapters=_MEASURED.adapters, compositions=_MEASURED.population, terms=_MEASURED.terms, adapter_exponent=0.0,
        weightings=1, exponent=ZIPF_EXPONENT,
    )  # fmt: skip
    fleet = Fleet(slots=_MEASURED.slots, tokens=ZIPF_TOKENS, device=25, host=102, held=_MEASURED.hot, clients=_MEASURED.clients)
    return Scenario(f"measured.{seed}", fleet, requests, population=population, seed=seed, warm=0.0)
