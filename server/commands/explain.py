"""`loramix explain`: what a merged adapter keeps of each of its sources."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from merging import MergeSpec
from merging.errors import OutputError
from merging.report import ModuleReport, Overlap, explain, total
from server.commands.recipes import Adapters, Device, Expression, Json, device_of, progress_bar, read_recipe


def explain_command(
    expression: Expression,
    adapters: Adapters,
    device: Device = "cpu",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw it, by layer and kind of module.")] = None,
    as_json: Json = False,
) -> None:
    """Print what merging EXPR keeps of each adapter.

    energy: the part of it that lies in the merged adapter's row and column spaces; cosine: how much of the merged
    adapter it is; gain: how strongly it is in there, 1 being as alone; shared: its units that lego clustered with others'.
    """
    spec, sources = read_recipe(expression, adapters)
    with progress_bar("Merging", 1) as advance:
        reports = explain(sources, spec, device=device_of(device))
        advance(1)
    names = [term.adapter for term in spec.terms]
    if plot is not None:
        from server.commands.explain_plot import draw  # matplotlib is an extra

        try:
            draw(reports, names, expression, plot)
        except OSError as error:
            raise OutputError(f"{plot} cannot be written ({error})") from error
    if as_json:
        modules = {r.module: {name: _values(overlap) for name, overlap in r.sources.items()} for r in reports}
        print(json.dumps({"total": {name: _values(total(reports, name)) for name in names}, "modules": modules}, indent=1))
        return
    _print(reports, spec, names)


def _values(overlap: Overlap) -> dict[str, float]:
    return {name: round(getattr(overlap, name), 6) for name in ("energy", "cosine", "gain", "shared")}


def _print(reports: list[ModuleReport], spec: MergeSpec, names: list[str]) -> None:
    clustered = spec.method.name == "lego"
    table = Table("module", *(f"{name}\nenergy cosine gain{' shared' if clustered else ''}" for name in names))
    for kind in sorted({report.kind for report in reports}):
        part = [report for report in reports if report.kind == kind]
        table.add_row(kind, *(_cell(total(part, name), clustered) for name in names))
    table.add_section()
    table.add_row("all", *(_cell(total(reports, name), clustered) for name in names))
    Console().print(table)


def _cell(overlap: Overlap, clustered: bool) -> str:
    if not overlap.units:
        return "–"
    shared = f" {overlap.shared:6.2f}" if clustered else ""
    return f"{overlap.energy:6.2f} {overlap.cosine:6.2f} {overlap.gain:4.2f}{shared}"
