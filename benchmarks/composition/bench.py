"""The whole command: run, record, tables, plots."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from model import ModelError, ensure_model
from skills import DataError

from benchmarks.composition.plots import draw
from benchmarks.composition.record import record, save
from benchmarks.composition.run import Options, left, run
from benchmarks.composition.study import FULL, QUICK
from benchmarks.composition.tables import tables
from benchmarks.composition.work import StudyError
from merging.errors import OutputError

_ROOT = Path(__file__).parents[2]


def bench(
    *,
    data: Path,
    model: Path | None,
    work: Path,
    device: torch.device,
    seconds: float | None,
    quick: bool,
    out: Path | None,
    plots: Path | None,
    command: str,
    say: Callable[[str], None],
) -> None:
    """Begin or go on with a run; once it is complete, write composition.json and the plots, and say the tables.

    Args:
        model: the base; examples/model.py makes it ready if not given.
        seconds: after which nothing more is begun; another call goes on.
        out, plots: folders, benchmarks/results and docs unless given; of a quick run, the work folder.
        command: for the record.
        say: told each line, as of `run`.

    Raises:
        StudyError: where data, model or work folder cannot be used.
    """
    sizes = QUICK if quick else FULL
    try:
        base = model or ensure_model(say=say)
        options = Options(data, base, work, device, sizes, math.inf if seconds is None else seconds, command)
        done = run(options, say)
    except (DataError, ModelError) as error:
        raise StudyError(str(error)) from error
    if rows := left(done, sizes):
        say(f"{rows} rows are left: the same command goes on")
        return
    found = record(done, sizes)
    path = (out or (work if quick else _ROOT / "benchmarks" / "results")) / "composition.json"
    save(found, path)
    say(tables(found))
    say(f"written to {path}")
    try:
        for plot in draw(found, (plots or (work if quick else _ROOT / "docs")) / path.stem):
            say(f"drawn: {plot}")
    except OutputError as error:
        say(f"no plots: {error}; the same command draws them where it is")
