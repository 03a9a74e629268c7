"""`loramix bench`: measurements of loramix on this machine."""

import importlib
import json
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from merging import METHODS, RecipeError
from merging.errors import OutputError, nearest
from server.commands.recipes import device_of
from server.errors import ConfigError
from server.tuning import FOLDER

bench = typer.Typer(no_args_is_help=True, help="Measure loramix on this machine.")
_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results"
_WORK = Path(tempfile.gettempdir()) / "loramix-bench"


@bench.callback()
def _bench() -> None:
    """Measure loramix on this machine."""


@bench.command("merge")
def bench_merge(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    case: Annotated[list[str] | None, typer.Option(metavar="SHAPE.TxRANK", help="Such as llama-8b.4x16; repeatable.")] = None,
    methods: Annotated[str, typer.Option(help="With commas between.")] = ",".join(METHODS),
    seconds: Annotated[float, typer.Option(help="For each of our figures.")] = 1.0,
    peft_seconds: Annotated[float, typer.Option(help="For PEFT in all; 0 leaves it out.")] = 60.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where merge-<device>.json goes.")] = _RESULTS,
) -> None:
    """Merge random adapters by every method, beside PEFT and beside the time that moving the bytes takes."""
    runner: Any = _benchmark("merge")
    names = _chosen(methods, METHODS, "method")
    where = device_of(device)
    chosen = case or (["llama-8b.4x16"] if where.type == "cuda" else ["smollm2-135m.4x8"])
    try:
        cases = [runner.parse_case(text) for text in chosen]
    except ValueError as error:
        raise RecipeError(str(error), "case") from error
    command = "loramix bench merge " + shlex.join(sys.argv[3:])
    console, figures = Console(), {}
    try:
        with Console(stderr=True).status("Measuring") as status:
            for name, value in runner.measure(cases, names, where, peft_seconds=peft_seconds, seconds=seconds):
                figures[name] = value
                path = runner.save(figures, where, command, out)  # each as it comes: a run may be stopped
                status.update(f"Measured {name}")
    except KeyboardInterrupt:
        console.print("stopped; what was measured until now:")
    table = Table("case", "method", "ms", "quartiles", "floor ms", "PEFT ms", title=runner.hardware(where))
    for name, value in figures.items():
        if name.endswith(".ms"):
            stem = name.removesuffix(".ms")
            case_name, _, method = stem.rpartition(".")
            spread = "–".join(f"{figures[f'{stem}.{q}_ms']:.2f}" for q in ("q1", "q3") if f"{stem}.{q}_ms" in figures)
            peft = f"{figures[f'{stem}.peft_ms']:.0f}" if f"{stem}.peft_ms" in figures else "–"
            table.add_row(case_name, method, f"{value:.2f}", spread, f"{figures[f'{stem}.floor_ms']:.2f}", peft)
    console.print(table)
    if figures:
        console.print(f"written to {path}")


@bench.command("serve")
def bench_serve(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model.")] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a model: random weights in a shape, such as llama-8b.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="With --shape: a folder with a tokenizer.json.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    part: Annotated[str, typer.Option(help="What to measure, with commas between: storm, ttft, zipf, ….")] = (
        "storm,ttft,zipf,ratio,ranks,price"
    ),
    seconds_per_part: Annotated[float, typer.Option(help="Of measuring; starting servers comes on top.")] = 60.0,
    at_once: Annotated[int | None, typer.Option(help="Servers side by side; as many as fit unless told otherwise.")] = None,
    tuned: Annotated[Path, typer.Option(metavar="DIR", help="Tuned LoRA kernel configurations.")] = FOLDER,
    work: Annotated[Path, typer.Option(metavar="DIR", help="For model, adapters, logs; what is there is used again.")] = _WORK,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where serve-<device>.json goes.")] = _RESULTS,
    plots: Annotated[Path, typer.Option(metavar="DIR", help="Where the plots go.")] = _ROOT / "docs",
) -> None:
    """Serve compositions to clients over HTTP, beside vLLM's own server, and measure what they notice."""
    runner: Any = _benchmark("serve")
    options = runner.Options(
        command="loramix bench serve " + shlex.join(sys.argv[3:]), device=device_of(device).type,
        parts=_chosen(part, runner.PARTS, "part"), seconds=seconds_per_part, model=model, shape=shape, tokenizer=tokenizer,
        work=work.resolve(), results=out, tuned=tuned.resolve() if any(tuned.glob("*.json")) else None, at_once=at_once,
    )  # fmt: skip
    notes = Console(stderr=True, highlight=False)
    path, problems = runner.measure(options, lambda line: notes.print(f"[bold]==>[/] {line}", soft_wrap=True))
    if path.exists():
        record = json.loads(path.read_text())
        Console().print(_figures(record, runner.TARGETS))
        Console().print(f"written to {path}", soft_wrap=True)
        _draw(runner, path, plots)
    if problems:
        raise OutputError("not everything was measured:\n" + "\n".join(problems))


@bench.command("composition")
def bench_composition(
    data: Annotated[Path, typer.Option(metavar="DIR", help="The public data; examples/README.md has its sources.")],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="The base; SmolLM2-135M-Instruct unless given.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    quick: Annotated[bool, typer.Option("--quick", help="Much less of everything, to see that it runs; for a CPU.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing after so many; the same command goes on.")] = None,
    work: Annotated[Path, typer.Option(metavar="DIR", help="The run's folder, from which it goes on.")] = _WORK / "composition",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where composition.json goes.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the plots go.")] = None,
) -> None:
    """Train skill adapters, compose them by every method, and judge what the compositions can do."""
    try:
        runner: Any = _benchmark("composition.bench")
    except ImportError as error:
        raise ConfigError(f"the study needs {error.name}: pip install 'loramix[examples]'") from error
    runner.bench(
        data=data, model=model, work=work, device=device_of(device), seconds=seconds, quick=quick, out=out, plots=plots,
        command="loramix bench composition " + shlex.join(sys.argv[3:]),
        say=partial(print, flush=True),
    )  # fmt: skip


@bench.command("fleet")
def bench_fleet(
    quick: Annotated[bool, typer.Option("--quick", help="Much less of everything, to see that it runs.")] = False,
    work: Annotated[Path, typer.Option(metavar="DIR", help="For adapters to measure with, and all of a quick run.")] = _WORK
    / "fleet",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where fleet.json goes.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the plots go.")] = None,
) -> None:
    """Simulate up to 1,000 replicas with what was measured on one: hit rates, merges, disks, and what runs out first."""
    runner: Any = _benchmark("fleet.bench")
    command = " ".join(["loramix bench fleet", *map(shlex.quote, sys.argv[3:])])
    runner.bench(quick=quick, work=work, out=out, plots=plots, command=command, say=partial(print, flush=True))


@bench.command("plots")
def bench_plots(
    results: Annotated[Path, typer.Argument(metavar="FILE", help="A serve-<device>.json.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the plots go.")] = _ROOT / "docs",
) -> None:
    """Draw the plots of results that were measured elsewhere."""
    if not results.is_file():
        raise OutputError(f"no file {results}; `loramix bench serve` writes one")
    _draw(_benchmark("serve"), results, out)


def _benchmark(name: str) -> ModuleType:
    """A module of benchmarks/, which is beside the packages and not among them. Raises OutputError."""
    if not (_ROOT / "benchmarks").is_dir():
        raise OutputError(f"{_ROOT / 'benchmarks'} is not there; run from a checkout of loramix")
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    return importlib.import_module(f"benchmarks.{name}")


def _chosen(text: str, known: Any, kind: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {kind} {name!r}{nearest(name, known)}")
    return names


def _figures(record: dict[str, Any], targets: dict[str, tuple[str, float]]) -> Table:
    table = Table("part", "figure", "value", "target", title=f"{record['hardware']}, {record['date']}")
    for part, run in record["runs"].items():
        for name in run["figures"]:
            value, target = record["figures"][name], ""
            if name in targets and record["hardware"].startswith("NVIDIA H100"):
                sign, limit = targets[name]
                met = value <= limit if sign == "≤" else value >= limit
                target = f"[{'green' if met else 'red'}]{sign} {limit:g}[/]"
            table.add_row(part, name, f"{value:,.4g}", target)
    return table


def _draw(runner: Any, results: Path, folder: Path) -> None:
    console = Console(soft_wrap=True)
    try:
        paths = runner.plots.draw(json.loads(results.read_text()), folder / results.stem)
    except OutputError as error:
        console.print(f"no plots: {error}; `loramix bench plots {results}` draws them where it is")
        return
    for path in paths:
        console.print(f"drawn: {path}")
