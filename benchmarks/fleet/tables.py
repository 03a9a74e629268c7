"""A record's tables, in Markdown; docs/scaling.md shows them as they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.fleet.routing import ROUTERS
from benchmarks.fleet.study import EXPONENTS, FEW, HOSTS, LARGE, LOADS, MANY, NEW_PER_HOUR, QUICKER, SLOTS, SLOWER, STORAGES
from benchmarks.fleet.summary import ENDLESS_MS

_CACHES = {name: name for name in STORAGES} | {"quicker": f"folder, reads {QUICKER:g} times as quick"}

Figures = Mapping[str, Mapping[str, float]]


def tables(record: Mapping[str, Any]) -> str:
    """All tables, each under its title."""
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in by_title(record).items())


def by_title(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables by their titles."""
    figures: Figures = record["figures"]
    return {
        "Hit rate by replicas and router, percent": _hits(figures, "routing", FEW),
        "Hit rate by exponent and router, percent": _hits(figures, "exponent", EXPONENTS),
        "First token, 99th percentile by load and router, ms": _waits(
            figures, [f"load.{{}}.{name}" for name in ROUTERS], ROUTERS
        ),
        "First token, 99th percentile by load and disk caches, ms": _waits(
            figures, [f"storage.{name}.{{}}" for name in _CACHES], _CACHES.values()
        ),
        "Fleets": _fleets(figures),
        "Slots": _slots(figures),
        "Disk caches": _storages(figures),
        "What changes": _changes(figures),
        "Load that is borne": _borne(figures),
        "Against a real server": _real(figures),
        "Adapters that nobody asks for": _start(figures),
    }


def _hits(figures: Figures, group: str, columns: Sequence[float]) -> str:
    rows = [
        [name, *(f"{100 * figures[f'{group}.{column:g}.{name}']['hit_rate']:.1f}" for column in columns)] for name in ROUTERS
    ]
    rule = ["rule of thumb", *(f"{100 * figures['rule.hit_rate'][f'{group}.{column:g}']:.1f}" for column in columns)]
    return _table(["router", *(f"{column:g}" for column in columns)], [*rows, rule])


def _waits(figures: Figures, names: Sequence[str], labels: Any) -> str:
    rows = [
        [label, *(_wait(figures[name.format(f"{load:g}")]["first_token_ms_p99"]) for load in LOADS)]
        for label, name in zip(labels, names, strict=True)
    ]
    return _table(["", *(f"{load:g}" for load in LOADS)], rows)


def _wait(ms: float) -> str:
    return f"{ms:,.0f}" if ms < ENDLESS_MS else "∞"


_FLEET: Mapping[str, tuple[str, int, Callable[[float], str]]] = {
    "requests/s": ("requests_per_s", 1, "{:,.0f}".format), "hits, %": ("hit_rate", 100, "{:.0f}".format),
    "builds/s": ("builds_per_s", 1, "{:,.0f}".format), "files a build": ("reads_per_build", 1, "{:.2f}".format),
    "merges/s": ("merges_per_s", 1, "{:,.0f}".format), "folder read, GB/s": ("folder_read_gb_per_s", 1, "{:,.1f}".format),
    "written, GB/s": ("folder_written_gb_per_s", 1, "{:,.1f}".format),
    "own disk read, GB/s": ("own_disk_read_gb_per_s", 1, "{:,.1f}".format),
    "threads, %": ("threads_busy", 100, "{:.0f}".format), "busiest/mean": ("busiest_over_mean", 1, "{:.2f}".format),
    "p50, ms": ("first_token_ms_p50", 1, _wait), "p99, ms": ("first_token_ms_p99", 1, _wait),
}  # fmt: skip


def _rows(figures: Figures, labels: Mapping[str, str], columns: Sequence[str]) -> str:
    """A row for each scenario, by its name and what it is called."""
    rows = []
    for name, label in labels.items():
        chosen = (_FLEET[column] for column in columns)
        rows.append([label, *(form(factor * figures[name][key]) for key, factor, form in chosen)])
    return _table(["", *columns], rows)


def _fleets(figures: Figures) -> str:
    columns = [name for name in _FLEET if name not in ("own disk read, GB/s", "files a build")]
    names = [f"fleet.{count}.{router}" for count in MANY for router in LARGE]
    return _rows(figures, {name: name.removeprefix("fleet.").replace(".", ", ") for name in names if name in figures}, columns)


def _slots(figures: Figures) -> str:
    labels = {f"slots.{count}.{router}": f"{count}, {router}" for count in SLOTS for router in ("random", "full")}
    return _rows(figures, labels, ["hits, %", "builds/s", "folder read, GB/s", "threads, %", "p99, ms"])


def _storages(figures: Figures) -> str:
    labels = {f"storage.{name}.0.5": label for name, label in _CACHES.items()}
    labels |= {f"host.{count}": f"folder, {count} adapters in host memory" for count in HOSTS}
    left_out = ("requests/s", "builds/s", "busiest/mean")
    columns = [name for name in _FLEET if name not in left_out]
    return _rows(figures, labels, columns)


def _changes(figures: Figures) -> str:
    labels = {"routing.32.full": "nothing"} | {f"new.{count}": f"{count:,} new an hour" for count in NEW_PER_HOUR}
    labels |= {f"flash.{name}": f"one gets 10 %, {name}" for name in ROUTERS}
    return _rows(figures, labels, ["hits, %", "builds/s", "busiest/mean", "p50, ms", "p99, ms"])


def _borne(figures: Figures) -> str:
    rules = figures["rule.load"]
    rows = [
        [name.replace(".", ", "), f"{load:g}", f"{rules[name]:.2f}" if name in rules else "–"]
        for name, load in figures["borne"].items()
    ]
    return _table(["", "simulated", "rule of thumb"], rows)


def _real(figures: Figures) -> str:
    real, rows = figures["real"], []
    for name in dict.fromkeys(key.rpartition(".")[0] for key in real):
        values = (real[f"{name}.{which}"] for which in ("measured", "mean", "least", "most", "slow"))
        rows.append([name.replace("_", " "), *(f"{value:.4g}" for value in values)])
    return _table(["", "measured", "simulated", "least", "most", f"reads {SLOWER:g} times as slow"], rows)


def _start(figures: Figures) -> str:
    """What was measured of one adapter, and as many times that."""
    counts, start = (1, 1_000, 10_000, 100_000), figures["start"]
    rows = {
        "checked before the start, full size, one thread, s": start["check_ms"] / 1e3,
        "of that, what does not depend on the size, s": start["check_small_ms"] / 1e3,
        "catalog, MiB": start["catalog_kib"] / 1024,
        "files, GiB": figures["costs"]["nbytes"] / 2**30,
    }
    return _table(
        ["", *(f"{count:,}" for count in counts)],
        [[label, *(f"{float(f'{count * value:.3g}'):,.10g}" for count in counts)] for label, value in rows.items()],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
