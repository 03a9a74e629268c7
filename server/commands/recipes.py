"""What the commands on recipes share: their arguments, reading the adapters, and the progress bar."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from merging import AdapterError, LoraAdapter, MergeSpec, RecipeError, load_adapter
from merging.errors import nearest
from server.grammar import parse_expression, parse_object

DEFAULT_METHOD = "cat"

Expression = Annotated[str, typer.Argument(metavar="EXPR", help="A recipe: an expression, or the JSON object of a request.")]
Adapters = Annotated[Path, typer.Option(metavar="DIR", help="Folder whose subfolders are PEFT adapters.")]
Device = Annotated[str, typer.Option(help="Where to merge, such as cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_recipe(expression: str, folder: Path) -> tuple[MergeSpec, dict[str, LoraAdapter]]:
    """The spec of an expression or JSON object, and the adapters that it names.

    Raises:
        RecipeError: where it cannot be read or merged.
        AdapterError: where an adapter is not in the folder (with the nearest name), or cannot be used.
    """
    if expression.lstrip().startswith("{"):
        try:
            spec = parse_object(json.loads(expression), DEFAULT_METHOD)
        except json.JSONDecodeError as error:
            raise RecipeError(f"the recipe is no JSON ({error}); quote it whole, or write an expression", "model") from error
    else:
        spec = parse_expression(expression, DEFAULT_METHOD)
    if not folder.is_dir():
        raise AdapterError(f"no folder {folder}; --adapters takes the folder whose subfolders are adapters")
    known = [path.name for path in folder.iterdir() if path.is_dir()]
    for term in spec.terms:
        if term.adapter not in known:
            raise AdapterError(f"no adapter {term.adapter!r} in {folder}{nearest(term.adapter, known)}")
    return spec, read_adapters({term.adapter: folder / term.adapter for term in spec.terms})


def read_adapters(paths: dict[str, Path]) -> dict[str, LoraAdapter]:
    """Adapters by name, with a progress bar on stderr."""
    adapters = {}
    with progress_bar("Reading", len(paths)) as advance:
        for name, path in paths.items():
            adapters[name] = load_adapter(path)
            advance(1)
    return adapters


def modules_of(adapters: Mapping[str, LoraAdapter]) -> int:
    """How many modules they adapt together."""
    return len(set().union(*(adapter.modules for adapter in adapters.values())))


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr that is gone when the work is done; the function given takes how many more are done.

    Args:
        total: how many there are.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


def device_of(name: str) -> torch.device:
    """A device that is there. Raises RecipeError."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu", "device") from error
    return device
