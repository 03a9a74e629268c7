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
from benchmarks.publish import publish


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
    trial = work if quick else None
    publish(found, trial=trial, out=out, plots=plots, save=save, tables=tables, draw=draw, say=say)
