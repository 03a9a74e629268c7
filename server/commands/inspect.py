"""`loramix inspect`: what adapters are, and whether and how they can be merged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merging import METHODS, LoraAdapter, MergeSpec, RecipeError, Term, check_rank, ranks
from merging.layout import lay_out
from merging.peft_folder import CONFIG
from merging.report import norms
from server.commands.recipes import Json, read_adapters

_COLUMNS = ("rank", "alpha", "parameters", "dtype", "digest")
_DIGEST_SHOWN = 12  # characters


def inspect_command(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT folders.")],
    as_json: Json = False,
) -> None:
    """Print what adapters are: rank, alpha, targets, size, dtype, base, content, norms; and the methods that merge them."""
    read = read_adapters({str(path): path for path in adapters})
    facts = {name: _facts(name, adapter) for name, adapter in read.items()}
    verdicts = _verdicts(read)
    if as_json:
        print(json.dumps({"adapters": facts, "methods": verdicts}, indent=1))
    else:
        _print(facts, verdicts)


def _facts(name: str, adapter: LoraAdapter) -> dict[str, Any]:
    config = json.loads((Path(name) / CONFIG).read_text())
    dtypes = sorted({str(stack.a_LRI.dtype).removeprefix("torch.") for stack in adapter.stacks})
    spread = sorted(set(ranks(adapter).values()))
    return {
        "rank": spread[0] if len(spread) == 1 else f"{spread[0]}–{spread[-1]}",
        "alpha": config["lora_alpha"],
        "targets": sorted({module.rpartition(".")[2] for module in adapter.modules}),
        "parameters": sum(stack.a_LRI.numel() + stack.b_LRO.numel() for stack in adapter.stacks),
        "dtype": " ".join(dtypes),
        "base": adapter.base_model,
        "digest": adapter.digest,
        "norms": norms(adapter),
    }


def _verdicts(adapters: Mapping[str, LoraAdapter]) -> dict[str, str | None]:
    """Why each method cannot merge the adapters; None for those that can."""
    terms = [Term(name) for name in adapters]
    ranks_of = {name: ranks(adapter) for name, adapter in adapters.items()}
    misfit = _misfit(adapters, terms)
    verdicts: dict[str, str | None] = {}
    for method in METHODS:
        try:
            check_rank(MergeSpec.create(method, terms), ranks_of)
            verdicts[method] = misfit
        except RecipeError as error:
            verdicts[method] = str(error)
    return verdicts


def _misfit(adapters: Mapping[str, LoraAdapter], terms: Sequence[Term]) -> str | None:
    """Why the adapters do not go together by whatever method: their modules differ in shape."""
    try:
        lay_out(list(adapters.values()), terms, torch.device("cpu"))
    except RecipeError as error:
        return str(error)
    return None


def _print(facts: Mapping[str, Mapping[str, Any]], verdicts: Mapping[str, str | None]) -> None:
    """Two tables, of a line an adapter and of a line a kind of module, then what can be done with them."""
    console = Console()
    table = Table("adapter", *_COLUMNS)
    for column in table.columns[1:]:
        column.no_wrap = True
    for name, fact in facts.items():
        shown = {**fact, "parameters": f"{fact['parameters']:,}", "digest": fact["digest"][:_DIGEST_SHOWN]}
        table.add_row(_short(name), *(str(shown[column]) for column in _COLUMNS))
    console.print(table)
    table = Table("‖ΔW‖, root mean square", *map(_short, facts))
    for kind in sorted(set().union(*(fact["targets"] for fact in facts.values()))):
        table.add_row(kind, *(f"{fact['norms'][kind]:.3g}" if kind in fact["norms"] else "–" for fact in facts.values()))
    console.print(table)
    for base in sorted({str(fact["base"]) for fact in facts.values()}):
        owners = [_short(name) for name, fact in facts.items() if str(fact["base"]) == base]
        console.print(f"base model of {', '.join(owners)}: {escape(base)}", highlight=False)
    able = [method for method, verdict in verdicts.items() if verdict is None]
    console.print(f"can be merged by: {', '.join(able) or 'no method'}")
    for verdict in sorted({verdict for verdict in verdicts.values() if verdict}):
        console.print(f"  [dim]{escape(verdict)}[/]")


def _short(name: str) -> str:
    return escape(Path(name).name)
