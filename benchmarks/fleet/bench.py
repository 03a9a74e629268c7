"""The whole command: measure what the simulation needs, simulate, record, tables, plots."""

import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fleet import summary
from benchmarks.fleet.costs import Costs, read_costs
from benchmarks.fleet.plots import draw
from benchmarks.fleet.start import Counts, measure
from benchmarks.fleet.study import FULL, QUICK, Scenario, scenarios
from benchmarks.fleet.tables import tables
from benchmarks.machine import hardware, head
from benchmarks.publish import RESULTS, publish

_COUNTS = {False: Counts(full=6, small=300), True: Counts(full=1, small=6)}


def bench(*, quick: bool, work: Path, out: Path | None, plots: Path | None, command: str, say: Callable[[str], None]) -> None:
    """Write fleet.json and the plots, and say the tables.

    Args:
        work: where adapters to measure with go, for as long as that takes; and what a quick run writes.
        out, plots: folders, benchmarks/results and docs unless given; of a quick run, `work`.
        command: for the record.
        say: told each line.
    """
    work.mkdir(parents=True, exist_ok=True)
    say("measuring reading, checking and the catalog")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        start = _rounded(measure(_COUNTS[quick], Path(folder)))
    costs = read_costs(RESULTS, start["read_ms"] / 1e3)
    sizes = QUICK if quick else FULL
    todo = list(scenarios(sizes))
    say(f"simulating {len(todo)} fleets")
    found = _run(todo, costs)
    found |= summary.figures(costs, sizes.population, found)
    figures = {"costs": asdict(costs), "start": start, **{name: _rounded(values) for name, values in found.items()}}
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    record = {**head("fleet", hardware(torch.device("cpu")), versions, command), "figures": figures}
    trial = work if quick else None
    publish(record, trial=trial, out=out, plots=plots, save=save, tables=tables, draw=draw, say=say)


def save(record: Mapping[str, Any], path: Path) -> None:
    """Write it, the figures of each scenario on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in record["figures"].items())
    text = json.dumps({**record, "figures": {}}, indent=1)
    path.write_text(text.replace('"figures": {}', f'"figures": {{\n{lines}\n }}') + "\n")


def _run(todo: list[Scenario], costs: Costs) -> dict[str, dict[str, float]]:
    """Figures by scenario, in the order of `todo`; on all processors."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        running = [(scenario.name, pool.submit(scenario.run, costs)) for scenario in todo]
        return {name: done.result() for name, done in running}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.5g}") for key, value in values.items()}
