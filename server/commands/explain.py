"""`loramix explain`: what a merged adapter keeps of each of its sources."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merging.errors import OutputError
from merging.methods.lego import LegoOptions
from merging.report import ModuleReport, explain, total
from server.commands.explain_plot import draw
from server.commands.heat_map import check_plot
from server.commands.recipes import Adapters, Device, Expression, Json, device_of, modules_of, progress_bar, read_recipe


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
    if plot is not None:
        check_plot(plot)
    where = device_of(device)
    spec, sources = read_recipe(expression, adapters)
    with progress_bar("Merging and comparing", modules_of(sources)) as advance:
        reports = explain(sources, spec, device=where, progress=advance)
    names = [term.adapter for term in spec.terms]
    measures = ["energy", "cosine", "gain"] + ["shared"] * isinstance(spec.options, LegoOptions)
    if plot is not None:
        try:
            draw(reports, names, [measure for measure in measures if measure != "gain"], expression, plot)
        except OSError as error:
            raise OutputError(f"{plot} cannot be written ({error.strerror or error}); choose another place") from error
    if as_json:
        modules = {report.module: _values([report], report.sources, measures) for report in reports}
        print(json.dumps({"total": _values(reports, names, measures), "modules": modules}, indent=1))
    else:
        _print(reports, names, measures)


def _values(reports: Sequence[ModuleReport], names: Iterable[str], measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """By adapter and measure, over all of the reports' modules."""
    return {name: {m: round(getattr(total(reports, name), m), 6) for m in measures} for name in names}


def _print(reports: Sequence[ModuleReport], names: Sequence[str], measures: Sequence[str]) -> None:
    """A line an adapter for each kind of module, for each layer and for the whole."""
    table = Table("modules", "adapter", *measures)
    for section in (_by(reports, "kind"), _by(reports, "layer"), [("all", list(reports))]):
        table.add_section()
        for label, part in section:
            present = [name for name in names if total(part, name).units]
            for place, (name, values) in enumerate(_values(part, present, measures).items()):
                table.add_row("" if place else escape(label), escape(name), *(f"{values[m]:.2f}" for m in measures))
    Console().print(table)


def _by(reports: Sequence[ModuleReport], key: str) -> list[tuple[str, list[ModuleReport]]]:
    """The reports by kind or by layer, in order; modules outside the layers are left to the other sections."""
    found = sorted({getattr(report, key) for report in reports} - {None})
    label = "layer {}" if key == "layer" else "{}"
    return [(label.format(value), [report for report in reports if getattr(report, key) == value]) for value in found]
