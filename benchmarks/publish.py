"""How the record of a study becomes a file, tables and plots."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.errors import OutputError

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results"


def publish(
    record: Mapping[str, Any],
    *,
    trial: Path | None,
    out: Path | None,
    plots: Path | None,
    save: Callable[[Mapping[str, Any], Path], None],
    tables: Callable[[Mapping[str, Any]], str],
    draw: Callable[[Mapping[str, Any], Path], list[Path]],
    say: Callable[[str], None],
) -> None:
    """Write `<benchmark>.json` and the plots, and say the tables.

    Args:
        trial: the folder that a run which is only a trial writes to.
        out, plots: folders; unless given `trial`, or else benchmarks/results and docs.
        save, tables, draw: of this study; `draw` takes the path that the plots' names begin with.
    """
    path = (out or trial or RESULTS) / f"{record['benchmark']}.json"
    save(record, path)
    say(tables(record))
    say(f"written to {path}")
    try:
        for plot in draw(record, (plots or trial or _ROOT / "docs") / path.stem):
            say(f"drawn: {plot}")
    except OutputError as error:
        say(f"no plots: {error}; the same command draws them where it is")
