"""`loramix merge`: merge adapters into a PEFT folder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from merging import DTYPES, RecipeError, merge, save_adapter
from merging.errors import OutputError, nearest
from merging.peft_folder import CONFIG
from server.commands.recipes import Adapters, Device, Expression, Json, device_of, modules_of, progress_bar, read_recipe


def merge_command(
    expression: Expression,
    adapters: Adapters,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; it must not exist, unless with --force.")],
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the merged adapter: {', '.join(DTYPES)}.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that stands there, in one step.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters by a recipe, such as `lego-16(math*0.7+code)`, and write a PEFT folder that PEFT and vLLM load."""
    if dtype not in DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}", "dtype")
    _check_place(out, force)
    where = device_of(device)
    spec, sources = read_recipe(expression, adapters)
    with progress_bar("Merging", modules_of(sources)) as advance:
        merged = merge(sources, spec, device=where, dtype=DTYPES[dtype], progress=advance).to("cpu")
    try:
        save_adapter(merged, out.resolve(), replace=force)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{out} cannot be written ({reason}); nothing was left there, choose another folder") from error
    summary = {
        "out": str(out), "method": spec.method.name, "modules": len(merged.modules), "rank": merged.rank,
        "dtype": dtype, "bytes": merged.nbytes, "digest": merged.digest,
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"{out}: rank {merged.rank}, {len(merged.modules)} modules, {dtype}, {merged.nbytes / 1e6:.1f} MB")


def _check_place(out: Path, force: bool) -> None:
    """Before any work: nothing stands at `out`, or an adapter that may be replaced. Raises OutputError."""
    if out.exists() and not force:
        raise OutputError(f"{out} exists; choose another folder, or replace it with --force")
    if out.exists() and not (out / CONFIG).is_file():
        raise OutputError(f"{out} is no adapter, which is all that --force replaces; choose another folder")
