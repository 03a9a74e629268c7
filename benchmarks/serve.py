"""What serving compositions costs those who are being served: real clients over HTTP against real servers.

Clients run in processes of their own; their traffic is drawn from seeds. Every part's figures, and how each is measured, stand
in `benchmarks/serving/parts.py`; the servers in `benchmarks/serving/servers.py`; the sizes in `benchmarks/serving/stage.py`.
Servers of one run start side by side and are measured in turn while the others idle; results are written after each part.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import device_name, hardware
from benchmarks.serving import plots, record
from benchmarks.serving.bench import Bench
from benchmarks.serving.client import Client, TrafficError
from benchmarks.serving.parts import PARTS, TRIALS, Trial, waves
from benchmarks.serving.servers import Machine, running
from benchmarks.serving.stage import SCALES, build

__all__ = ["PARTS", "TARGETS", "Options", "measure", "plots"]

# For an H100 with an 8B shape, 8 streams and four rank-16 adapters: the most that a figure should be, or the least.
TARGETS = {
    "ready_ms_p50_device": ("≤", 15.0), "ready_ms_p99_device": ("≤", 40.0), "ready_ms_p50_host": ("≤", 25.0),
    "gap_ms_max_storm": ("≤", 20.0), "gap_ratio_p99_storm": ("≤", 1.3), "commit_ms_max": ("≤", 1.0),
    "ttft_ms_cold_over_warm": ("≤", 25.0), "throughput_ratio_warm": ("≥", 0.99), "token_ratio_lora_dual_tuned": ("≤", 1.2),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What `loramix bench serve` was told; see its help.

    Attributes:
        command: the command line, for the record.
        at_once: servers side by side; None as many as fit.
        tuned: folder of tuned LoRA kernel configurations; None where there are none.
    """

    command: str
    device: str
    parts: Sequence[str]
    seconds: float
    model: Path | None
    shape: str | None
    tokenizer: Path | None
    work: Path
    results: Path
    tuned: Path | None
    at_once: int | None


def measure(options: Options, say: Callable[[str], None]) -> tuple[Path, list[str]]:
    """Run the parts; the file of results, and what went wrong, a line each.

    A server that does not start, or answers wrongly, costs the parts that need it; the others go on.

    Raises:
        ConfigError: where model or shape cannot be used.
    """
    scale, problems = SCALES[options.device], []
    machine = Machine(options.device, options.tuned)
    where = hardware(torch.device(options.device))
    path = options.results / f"serve-{device_name(where, options.device)}.json"
    trials = [trial for trial in TRIALS if trial.part in options.parts and _applies(trial, options)]
    say("writing model and adapters")
    stage = build(options.work, scale, options.model, options.shape, options.tokenizer)
    measured: dict[str, Bench] = {}
    with Client() as streams, Client() as beside:
        alike = machine.alike(stage, scale)
        for wave in waves(trials, options.at_once or machine.at_once(stage), alike):
            names = sorted({alike[name] for trial in wave for name in trial.servers})
            say(f"starting {', '.join(names)} (logs in {options.work / 'logs'})")
            with running(names, machine, stage, scale, options.work / "logs") as (up, failed):
                problems += [f"{name}: {error}" for name, error in failed.items()]
                for trial in wave:
                    if any(alike[name] in failed for name in trial.servers):
                        continue
                    say(f"measuring {trial.part} on {', '.join(trial.servers)}")
                    bench = measured.setdefault(
                        trial.part, Bench(stage, scale, options.device, options.seconds, streams, beside)
                    )
                    try:
                        trial.run(bench, {name: up[alike[name]] for name in trial.servers})
                    except TrafficError as error:
                        problems.append(f"{trial.part} on {', '.join(trial.servers)}: {error}")
                    old = json.loads(path.read_text()) if path.exists() else None
                    record.save(record.merge(old, where, options.command, trial.part, bench.figures, bench.series), path)
    return path, problems


def _applies(trial: Trial, options: Options) -> bool:
    """Whether what a trial tells the price of is there: dual streams and tuned configurations are on a GPU only."""
    return options.device == "cuda" or trial.part != "price" or trial.servers in (("base",), ("lora",))
