"""What follows from all scenarios: the load that is borne, and how far off the rule of thumb and the simulation are."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.fleet import rule
from benchmarks.fleet.costs import Costs
from benchmarks.fleet.routing import ROUTERS
from benchmarks.fleet.study import BASE, EXPONENTS, FEW, LOAD, LOADS, QUICKER, SEEDS, SLOTS, STORAGES
from benchmarks.fleet.traffic import Population

Found = Mapping[str, Mapping[str, float]]

MOST_MS = 1000.0
"""The 99th percentile of the time to the first token, above which a load is not borne."""
ENDLESS_MS = 10_000.0
"""Waits over it grow as long as the traffic goes on."""
_RESULTS = Path(__file__).parents[1] / "results"


def figures(costs: Costs, population: Population, found: Found) -> dict[str, dict[str, float]]:
    """`borne`: the highest load of the grid that is borne, by router and by storage. `rule`: hit rates and loads as the rule of
    thumb has them. `off`: the largest differences. `real`: what was measured on a real server, and the simulation of it."""
    borne = {router: _borne(found, f"load.{{}}.{router}") for router in ROUTERS}
    borne |= {f"storage.{name}": _borne(found, f"storage.{name}.{{}}") for name in (*STORAGES, "quicker")}
    hits, loads = _hit_rates(population), _loads(costs, population, found)
    hashed = [abs(value - found[f"{name}.full"]["hit_rate"]) for name, value in hits.items() if f"{name}.full" in found]
    off = {
        "hit_rate_max": max(hashed),
        "hit_rate_mean": sum(hashed) / len(hashed),
        **{f"load.{name}": loads[name] - borne[name] for name in loads},
        "longer_hit_rate": found["longer"]["hit_rate"] - found["routing.32.full"]["hit_rate"],
    }
    return {"borne": borne, "rule.hit_rate": hits, "rule.load": loads, "off": off, "real": _real(found)}


def _borne(found: Found, name: str) -> float:
    """The highest load up to which every one is borne."""
    best = 0.0
    for load in LOADS:
        if found[name.format(f"{load:g}")]["first_token_ms_p99"] > MOST_MS:
            break
        best = load
    return best


def _hit_rates(population: Population) -> dict[str, float]:
    """By the names of the scenarios without their routers, which are hashing up to full replicas."""
    few = {f"routing.{count}": rule.hit_rate(population, BASE.slots, count, hashed=True) for count in FEW}
    skewed = {
        f"exponent.{exponent:g}": rule.hit_rate(replace(population, exponent=exponent), BASE.slots, BASE.replicas, hashed=True)
        for exponent in EXPONENTS
    }
    slots = {f"slots.{count}": rule.hit_rate(population, count, BASE.replicas, hashed=True) for count in SLOTS}
    return few | skewed | slots


def _loads(costs: Costs, population: Population, found: Found) -> dict[str, float]:
    """By router and storage. How many files a build reads is the simulation's; the rule says how much load that allows."""
    hashed, alone = (rule.hit_rate(population, BASE.slots, BASE.replicas, hashed=way) for way in (True, False))
    quick = replace(costs, read_seconds=costs.read_seconds / QUICKER)
    loads = {
        router: rule.load(costs, BASE.tokens, hits, found[f"routing.{BASE.replicas}.{router}"]["reads_per_build"])
        for router, hits in (("random", alone), ("full", hashed))
    }
    for name in (*STORAGES, "quicker"):
        reads = found[f"storage.{name}.{LOAD:g}"]["reads_per_build"]
        loads[f"storage.{name}"] = rule.load(quick if name == "quicker" else costs, BASE.tokens, hashed, reads)
    return loads


def _real(found: Found) -> dict[str, float]:
    measured = json.loads((_RESULTS / "serve-h100.json").read_text())["figures"]
    names = {
        "requests_per_s": "zipf_requests_per_s", "hit_rate": "zipf_slot_hit_rate",
        **{f"sources_{tier}_share": f"zipf_sources_{tier}_share" for tier in ("device", "host", "disk")},
        "first_token_ms_p50": "zipf_ttft_ms_p50_all", "first_token_ms_p99": "zipf_ttft_ms_p99_all",
    }  # fmt: skip
    values = {}
    for name, theirs in names.items():
        ours = [found[f"measured.{seed}"][name] for seed in range(SEEDS)]
        values |= {f"{name}.measured": measured[theirs], f"{name}.mean": sum(ours) / SEEDS}
        values |= {f"{name}.least": min(ours), f"{name}.most": max(ours)}
        values[f"{name}.slow"] = sum(found[f"slow.{seed}"][name] for seed in range(SEEDS)) / SEEDS
    return values
