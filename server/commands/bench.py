"""`loramix bench`: measurements of loramix on this machine."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from merging import METHODS, RecipeError
from merging.errors import OutputError, nearest
from server.commands.recipes import device_of

bench = typer.Typer(no_args_is_help=True, help="Measure loramix on this machine.")
_FOLDER = Path(__file__).parents[2] / "benchmarks"


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
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where merge-<device>.json goes.")] = _FOLDER / "results",
) -> None:
    """Merge random adapters by every method, beside PEFT and beside the time that moving the bytes takes."""
    spec = importlib.util.spec_from_file_location("loramix_bench_merge", _FOLDER / "merge.py")
    if spec is None or spec.loader is None or not (_FOLDER / "merge.py").exists():
        raise OutputError(f"{_FOLDER} is not there; run from a checkout of loramix")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    names = methods.split(",")
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"unknown method {name!r}{nearest(name, METHODS)}", "method")
    where = device_of(device)
    chosen = case or (["llama-8b.4x16"] if where.type == "cuda" else ["smollm2-135m.4x8"])
    try:
        cases = [runner.parse_case(text) for text in chosen]
    except ValueError as error:
        raise RecipeError(str(error), "case") from error
    console, figures = Console(), {}
    with Console(stderr=True).status("Measuring"):
        for name, value in runner.measure(cases, names, where, peft_seconds=peft_seconds, seconds=seconds):
            figures[name] = value
    table = Table("case", "method", "ms", "quartiles", "floor ms", "PEFT ms", title=runner.hardware(where))
    for name, value in figures.items():
        if name.endswith(".ms"):
            stem = name.removesuffix(".ms")
            case_name, _, method = stem.rpartition(".")
            spread = "–".join(f"{figures[f'{stem}.{q}_ms']:.2f}" for q in ("q1", "q3") if f"{stem}.{q}_ms" in figures)
            peft = f"{figures[f'{stem}.peft_ms']:.0f}" if f"{stem}.peft_ms" in figures else "–"
            table.add_row(case_name, method, f"{value:.2f}", spread, f"{figures[f'{stem}.floor_ms']:.2f}", peft)
    console.print(table)
    command = f"loramix bench merge --device {device} " + " ".join(f"--case {text}" for text in chosen)
    console.print(f"written to {runner.save(figures, where, command, out)}")
