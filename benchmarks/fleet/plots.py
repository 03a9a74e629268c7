"""The plots of a record: hit rates, what loads do, and what large fleets need."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.fleet.routing import ROUTERS
from benchmarks.fleet.study import EXPONENTS, FEW, LARGE, LOADS, MANY, SLOTS, STORAGES
from benchmarks.fleet.summary import ENDLESS_MS, MOST_MS


def draw(record: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write `<stem>-hits.png`, `-load.png` and `-large.png`.

    Raises:
        OutputError: without matplotlib.
    """
    title = f"simulated; a replica is one H100 with an 8B shape, 32 slots, 128 tokens a request; {record['date']}"
    return pictures.draw(record, {"hits": _hits, "load": _load, "large": _large}, title, 9, stem)


def _hits(figure: Any, record: Mapping[str, Any]) -> bool:
    """Hit rates by replicas, by exponent, and by slots; dashed, the rule of thumb."""
    figures = record["figures"]
    panels = figure.subplots(1, 3, sharey=True)
    groups: list[tuple[str, Sequence[float], Sequence[str], str]] = [
        ("routing", FEW, list(ROUTERS), "replicas"),
        ("exponent", EXPONENTS, list(ROUTERS), "exponent of the traffic, 32 replicas"),
        ("slots", SLOTS, ("random", "full"), "slots a replica, 32 replicas"),
    ]
    for panel, (group, places, routers, label) in zip(panels, groups, strict=True):
        for name in routers:
            rates = [100 * figures[f"{group}.{place:g}.{name}"]["hit_rate"] for place in places]
            panel.plot(places, rates, "o-", ms=3, lw=1, color=f"C{list(ROUTERS).index(name)}", label=name)
        rule = [100 * figures["rule.hit_rate"][f"{group}.{place:g}"] for place in places]
        panel.plot(places, rule, "--", lw=1, color="black", label="rule of thumb")
        if group != "exponent":
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(label)
    panels[0].set(ylabel="requests that find a slot, %", ylim=(0, None))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=7)
    return True


def _load(figure: Any, record: Mapping[str, Any]) -> bool:
    """The first token's 99th percentile by load: by router, and by disk caches."""
    panels = figure.subplots(1, 2, sharey=True)
    lines = (
        {name: f"load.{{}}.{name}" for name in ROUTERS},
        {name: f"storage.{name}.{{}}" for name in (*STORAGES, "quicker")},
    )
    for panel, named in zip(panels, lines, strict=True):
        for label, name in named.items():
            waits = [record["figures"][name.format(f"{load:g}")]["first_token_ms_p99"] for load in LOADS]
            panel.plot(LOADS, waits, "o-", ms=3, lw=1, label=label)
        panel.axhline(MOST_MS, color="gray", ls=":", lw=1)
        panel.set(xlabel="load, of the warm capacity", yscale="log")
        panel.legend(fontsize=7)
    panels[0].set(ylabel="first token, p99, ms", ylim=(100, ENDLESS_MS))
    return True


def _large(figure: Any, record: Mapping[str, Any]) -> bool:
    """By replicas: hits, builds, and what the folder has to give."""
    figures = record["figures"]
    counts = [count for count in MANY if f"fleet.{count}.full" in figures]
    panels = figure.subplots(1, 3)
    for panel, (key, factor, label) in zip(
        panels,
        (
            ("hit_rate", 100, "hits, %"),
            ("builds_per_s", 1, "builds a second"),
            ("folder_read_gb_per_s", 1, "read from the folder, GB/s"),
        ),
        strict=True,
    ):
        for name in LARGE:
            values = [factor * figures[f"fleet.{count}.{name}"][key] for count in counts]
            panel.plot(counts, values, "o-", ms=3, lw=1, color=f"C{list(ROUTERS).index(name)}", label=name)
        panel.set(xlabel="replicas", ylabel=label, xscale="log", yscale="linear" if factor == 100 else "log")
    panels[0].legend(fontsize=7)
    return True
