"""The command `loramix`: one file a subcommand under server/commands/."""

import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from merging import LoramixError
from server import logs, start_fault
from server.commands import bench, explain, fit, inspect, merge, serve, tune

# The processes that vLLM starts import this file before anything else.
logs.join()
start_fault.watch()

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command("merge")(merge.merge_command)
app.command("inspect")(inspect.inspect_command)
app.command("explain")(explain.explain_command)
app.command("fit")(fit.fit_command)
app.command("tune")(tune.tune_command)
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Run the command line; an error that loramix raises on purpose is one line on stderr and exit code 2."""
    try:
        app()
    except LoramixError as error:
        if logs.is_json():
            logging.getLogger("vllm.loramix").critical("%s", error)
            sys.exit(2)
        Console(stderr=True, highlight=False).print(Text("loramix:", "bold red"), str(error), markup=False, soft_wrap=True)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loramix {version('loramix')}")
        raise typer.Exit


@app.callback()
def loramix(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve any combination of LoRA adapters, chosen by each request."""
