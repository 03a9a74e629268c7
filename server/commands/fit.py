"""`loramix fit`: learn a recipe on data, and write it as a preset file."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from merging import LoraAdapter, MergeSpec, RecipeError, check_rank, ranks
from merging.errors import OutputError
from merging.fit import Fit, FitError, FitOptions, Rows, Search, fit, read_rows, search
from merging.report import kind_of
from server.commands.fit_model import load_model, load_tokenizer
from server.commands.fit_plot import draw_weights
from server.commands.heat_map import check_plot
from server.commands.recipes import Adapters, device_of, read_recipe
from server.grammar import readable
from server.preset_file import PresetFile, changed_options, names_file, save_preset_file

_CAT = "Weights of cat"


def fit_command(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The base model's folder, as transformers reads it.")],
    adapters: Adapters,
    use: Annotated[str, typer.Option(metavar="A+B", help="The adapters to compose.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: prompt and answer, or a chat under messages.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The preset file to write.")],
    held_out: Annotated[Path | None, typer.Option(metavar="FILE", help="To judge on; else a part of the data.")] = None,
    part: Annotated[float, typer.Option(help="The part of the data to hold out.")] = 0.2,
    fields: Annotated[str, typer.Option(help="Names of prompt and answer in the data.")] = "prompt,answer",
    most_tokens: Annotated[int | None, typer.Option(help="Longer rows are cut; the model's context if not given.")] = None,
    loss: Annotated[str, typer.Option(help="On the tokens of the answer, or on all.")] = "answer",
    method: Annotated[str, typer.Option(help="cat learns weights; others search for options and weights.")] = "cat",
    mode: Annotated[str, typer.Option(help="free or softmax.", rich_help_panel=_CAT)] = FitOptions.mode,
    share: Annotated[str, typer.Option(help="One weight a module, layer or adapter.", rich_help_panel=_CAT)] = FitOptions.share,
    start: Annotated[float | None, typer.Option(help="Of free weights; 1 if not given.", rich_help_panel=_CAT)] = None,
    lr: Annotated[float, typer.Option(help="Of Adam.", rich_help_panel=_CAT)] = FitOptions.lr,
    epochs: Annotated[int, typer.Option(help="At most.", rich_help_panel=_CAT)] = FitOptions.epochs,
    patience: Annotated[int, typer.Option(help="Epochs without gain before it stops.", rich_help_panel=_CAT)] = (
        FitOptions.patience
    ),
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, more time.", rich_help_panel=_CAT)
    ] = False,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = FitOptions.batch,
    seed: Annotated[int, typer.Option(help="Of the split, and of the order of the rows.")] = FitOptions.seed,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the weights, by layer and kind.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that stands there.")] = False,
) -> None:
    """Learn how to compose adapters on examples of what they are to do together, and write a preset.

    Serve it with `loramix serve … --preset NAME=FILE.json`. Base model and adapters stay as they are.
    """
    _check_place(out, force)
    if plot is not None:
        check_plot(plot)
    asked: dict[str, Any] = {
        "mode": mode, "share": share, "start": start, "lr": lr, "epochs": epochs, "batch": batch, "loss": loss, "seed": seed,
        "patience": patience, "checkpointing": checkpointing,
    }  # fmt: skip
    options = FitOptions(**asked)
    where = device_of(device)
    spec, sources = read_recipe(f"cat({use})", adapters)
    if any(term.weight != 1 for term in spec.terms):
        raise RecipeError(f"--use {use}: name the adapters alone; their weights are what is looked for", "weight")
    check_rank(MergeSpec.create(method, spec.terms), {name: ranks(adapter) for name, adapter in sources.items()})
    tokenizer, context = load_tokenizer(model)
    read = partial(_read, tokenizer=tokenizer, fields=fields, most_tokens=min(context, most_tokens or context))
    train, judging = (read(data), read(held_out)) if held_out else read(data).split(part, seed)
    base = load_model(model, where)
    with _bar("Fitting" if method == "cat" else "Searching") as progress:
        if method == "cat":
            result: Fit | Search = fit(base, sources, train, judging, options, progress=progress)
        else:
            result = search(base, sources, method, judging, loss=options.loss, batch=batch, progress=progress)
    learned, facts = _facts(result, options)
    record = {
        "model": model.resolve().name,
        "data": {"sha256": _sha256(data), "rows": len(train)},
        "held_out": {"sha256": _sha256(held_out or data), "rows": len(judging)},
        **facts,
        "versions": {name: version(name) for name in ("loramix", "torch", "transformers")},
    }
    save_preset_file(PresetFile.of(learned, {name: adapter.digest for name, adapter in sources.items()}, record), out)
    console = Console(soft_wrap=True, highlight=False)
    console.print(_tries(result) if isinstance(result, Search) else _weights(learned, sources))
    console.print(escape(f"{out}: {_verdict(facts)}"))
    if plot is not None:
        try:
            draw_weights(learned.terms, {name: list(adapter.modules) for name, adapter in sources.items()}, out.name, plot)
        except OSError as error:
            raise OutputError(f"{plot} cannot be written ({error.strerror or error}); choose another place") from error


def _check_place(out: Path, force: bool) -> None:
    """Before any work: the file may be written. Raises OutputError."""
    if not names_file(str(out)):
        raise OutputError(f"{out} is no name for a preset file; call it {out.with_suffix('.json')}")
    if out.is_dir() or (out.exists() and not force):
        raise OutputError(f"{out} exists; choose another name" + ("" if out.is_dir() else ", or replace it with --force"))


def _read(path: Path, tokenizer: Any, fields: str, most_tokens: int) -> Rows:
    prompt, comma, answer = fields.partition(",")
    if not (prompt and comma and answer):
        raise FitError(f"--fields {fields}: name the prompt and the answer with a comma between")
    rows, cut = read_rows(path, tokenizer, fields=(prompt, answer), most_tokens=most_tokens)
    if cut:
        note = f"{path}: {cut} rows are longer than {most_tokens} tokens and were cut, or left out with no answer in reach"
        Console(stderr=True, highlight=False).print("[yellow]loramix:[/]", escape(note), soft_wrap=True)
    return rows


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar with the loss on a terminal's stderr, gone when the work is done."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, most, loss: bar.update(task, completed=done, total=most, description=f"{title}, loss {loss:.4f}")


def _facts(result: Fit | Search, options: FitOptions) -> tuple[MergeSpec, dict[str, Any]]:
    """What to serve, and how it was found."""
    if isinstance(result, Fit):
        facts = {
            "options": dataclasses.asdict(options), "steps": result.steps, "uniform": result.uniform,
            "loss_before": result.loss_before, "loss_after": result.loss_after, "improved": result.improved,
        }  # fmt: skip
        return MergeSpec.create("cat", result.terms), facts
    before, after = result.tries[0].loss, result.best.loss
    facts = {"loss": options.loss, "tries": len(result.tries), "loss_before": before, "loss_after": after}
    return result.best.spec, {**facts, "improved": after < before}


def _verdict(facts: Mapping[str, Any]) -> str:
    uniform = f"weight {facts['uniform']:g} everywhere" if "uniform" in facts else "the defaults"
    before, after = (f"{facts[name]:.4f}" for name in ("loss_before", "loss_after"))
    if not facts["improved"]:
        return f"nothing was better on the held-out rows than {uniform} (loss {before}), so that is what it says"
    return f"loss on the held-out rows {after}, with {uniform} {before}"


def _tries(found: Search) -> Table:
    table = Table("recipe", "options", "loss", title="On the held-out rows")
    for tried in found.tries:
        options = ", ".join(f"{name} {value}" for name, value in changed_options(tried.spec).items())
        table.add_row(readable(tried.spec), options, f"{tried.loss:.4f}", style="bold" if tried == found.best else None)
    return table


def _weights(learned: MergeSpec, sources: Mapping[str, LoraAdapter]) -> Table:
    """Mean and range of the weights, by kind of module."""
    table = Table("α", *(term.adapter for term in learned.terms))
    for kind in sorted({kind_of(module) for source in sources.values() for module in source.modules}):
        cells = []
        for term in learned.terms:
            alphas = [term.at(module) for module in sources[term.adapter].modules if kind_of(module) == kind]
            cells.append(f"{fmean(alphas):.2f} ({min(alphas):.2f} to {max(alphas):.2f})" if alphas else "–")
        table.add_row(kind, *cells)
    return table


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
