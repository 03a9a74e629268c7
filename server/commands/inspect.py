"""`loramix inspect`: what adapters are, and whether and how they can be merged."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from merging import METHODS, LoraAdapter, MergeSpec, RecipeError, Term, check_rank, ranks
from merging.peft_folder import CONFIG
from merging.report import norms
from server.commands.recipes import Json, read_adapters


def inspect_command(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT folders.")],
    as_json: Json = False,
) -> None:
    """Print what adapters are: rank, alpha, targets, size, dtype, base, content, norms; and the methods that merge them."""
    read = read_adapters({str(path): path for path in adapters})
    facts = {name: _facts(name, adapter) for name, adapter in read.items()}
    verdicts = {method: _verdict(method, read) for method in METHODS}
    if as_json:
        print(json.dumps({"adapters": facts, "methods": verdicts}, indent=1))
        return
    console = Console()
    table = Table("adapter", "rank", "alpha", "targets", "parameters", "dtype", "base", "digest")
    for name, fact in facts.items():
        shown = [fact["rank"], fact["alpha"], " ".join(fact["targets"]), f"{fact['parameters']:,}", fact["dtype"], fact["base"]]
        table.add_row(Path(name).name, *map(str, shown), fact["digest"][:12])
    console.print(table)
    kinds = sorted(set().union(*(fact["norms"] for fact in facts.values())))
    table = Table("‖ΔW‖ (root mean square of modules)", *kinds)
    for name, fact in facts.items():
        table.add_row(Path(name).name, *(f"{fact['norms'][kind]:.3g}" if kind in fact["norms"] else "–" for kind in kinds))
    console.print(table)
    able = [method for method, verdict in verdicts.items() if verdict is None]
    console.print(f"can be merged by: {', '.join(able) or 'no method'}")
    for verdict in sorted({verdict for verdict in verdicts.values() if verdict}):
        console.print(f"  [dim]{verdict}[/]")
    bases = {fact["base"] for fact in facts.values()}
    if len(bases) > 1:
        console.print(f"[yellow]they say they were trained on different base models: {', '.join(sorted(map(str, bases)))}[/]")


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


def _verdict(method: str, adapters: dict[str, LoraAdapter]) -> str | None:
    """Why a method cannot merge the adapters, None if it can."""
    try:
        spec = MergeSpec.create(method, [Term(name) for name in adapters])
        check_rank(spec, {name: ranks(adapter) for name, adapter in adapters.items()})
        check_shapes(adapters)
    except RecipeError as error:
        return str(error)
    return None


def check_shapes(adapters: dict[str, LoraAdapter]) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for name, adapter in adapters.items():
        for stack in adapter.stacks:
            for module in stack.names:
                shape = (stack.b_LRO.shape[2], stack.a_LRI.shape[2])
                if shapes.setdefault(module, shape) != shape:
                    raise RecipeError(
                        f"{name} has {module} as {shape}, others as {shapes[module]}: different base models", "adapters"
                    )
