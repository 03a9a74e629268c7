"""`loramix tune`: find faster configurations of vLLM's LoRA kernels for a model on this GPU."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from server.commands.recipes import device_of
from server.errors import ConfigError
from server.shapes import ModelShape
from server.tuning import FOLDER, Tuned, launches, tune, write

# The sizes of decode batches, those most often served first, and a few of prompts.
_TOKENS = "8,1,16,4,2,32,64,256,2048"


def tune_command(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model, for its config.json.")] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a model, such as llama-8b.")] = None,
    max_loras: Annotated[int, typer.Option(min=1, help="As the server's.")] = 8,
    max_lora_rank: Annotated[int, typer.Option(min=1, help="As the server's.")] = 16,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As the server's.")] = 1,
    tokens: Annotated[str, typer.Option(help="Batch sizes with commas between, what matters most first.")] = _TOKENS,
    seconds: Annotated[float, typer.Option(help="For the whole search.")] = 300.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the two files go; what else they hold stays.")] = FOLDER,
) -> None:
    """Search configurations of vLLM's LoRA kernels that are faster on this GPU, and write them for `loramix serve`.

    Each is measured in CUDA graphs over the weights of many layers, its result checked, as VLLM_LORA_ENABLE_DUAL_STREAM is set.
    """
    device = device_of("cuda")
    if (model is None) == (shape is None):
        raise ConfigError("name a model with --model DIR, or a shape with --shape")
    sizes = ModelShape.read(model) if model is not None else ModelShape.named(shape or "")
    counts = tokens.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ConfigError(f"--tokens {tokens}: write whole numbers with commas between")
    os.environ.pop("VLLM_TUNED_CONFIG_FOLDER", None)  # vLLM's own configurations are where the search starts
    import torch

    from server.vllm_tune import Timer  # importing vLLM takes ten seconds

    timer = Timer(max_loras)
    todo = launches(sizes, max_lora_rank, [int(count) for count in counts], tensor_parallel_size)
    results: list[Tuned] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Tuning", total=len(todo))
        for tuned in tune(todo, timer.default, timer, seconds):
            results.append(tuned)
            progress.advance(task)
    table = Table("kernel", "slices, tokens, k, n", "vLLM's own µs", "tuned µs", "configuration")
    for tuned in results:
        own = timer.default(tuned.launch)
        changed = ", ".join(f"{name} {value}" for name, value in tuned.config.items() if own[name] != value)
        place = " ".join(map(str, tuned.launch.place))
        times = f"{tuned.default_microseconds:.1f}", f"{tuned.microseconds:.1f}"
        table.add_row(tuned.launch.kernel, place, *times, changed or "vLLM's own")
    Console().print(table)
    for path in write(results, timer.default, max_loras, torch.cuda.get_device_name(device), out):
        Console().print(f"written to {path}", soft_wrap=True)
