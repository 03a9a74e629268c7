"""`loramix serve`: vLLM's OpenAI-compatible server with loramix in it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from merging import AdapterError
from merging.spec import MAX_TERMS
from server.config import Settings
from server.errors import ConfigError
from server.kept import Kept
from server.keys_file import read_keys
from server.logs import to_json
from server.preflight import check_cache_dir, check_memory, check_model
from server.preset_file import names_file, read_preset_file
from server.sources import adapter_folders
from server.survey import survey

_READERS = 8  # adapters read and checked at a time; each is in memory twice then


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The base model: a folder, or a name on the Hub.")],
    adapters: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder whose subfolders are PEFT adapters; repeatable.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="One adapter: a folder, or ORG/REPO on the Hub; repeatable.")
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RECIPE", help="A recipe that clients can pick by name, or a FILE.json of `loramix fit`; repeatable."
        ),
    ] = None,
    default_method: Annotated[str, typer.Option(help="Merges a sum that names no method, such as math+code.")] = "cat",
    skip_bad_adapters: Annotated[
        bool, typer.Option("--skip-bad-adapters", help="Start without adapters that cannot be used.")
    ] = False,
    merge_timeout: Annotated[float, typer.Option(help="Seconds that a request waits for its merge at most.")] = 30.0,
    merge_queue: Annotated[int, typer.Option(help="Merges that wait for a slot at most; more are refused with 503.")] = 64,
    cold_merges_per_minute: Annotated[
        int | None,
        typer.Option(help="Merges that each client may ask for in a minute; more are refused with 429. No limit unless given."),
    ] = None,
    max_adapters_per_recipe: Annotated[int, typer.Option(help="Adapters in one recipe at most.")] = MAX_TERMS,
    max_body_mib: Annotated[float, typer.Option(help="Size of a request's body at most, in MiB.")] = 32.0,
    adapter_host_gib: Annotated[float, typer.Option(help="Host memory for source adapters, in GiB.")] = 4.0,
    adapter_gpu_gib: Annotated[
        float, typer.Option(help="Memory of each GPU for source adapters, in GiB; taken from --gpu-memory-utilization.")
    ] = 2.0,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder in which merged adapters outlive the server; servers may share it."),
    ] = None,
    cache_disk_gib: Annotated[float, typer.Option(help="Disk space for merged adapters, in GiB.")] = 20.0,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Further folder below which admins may add adapters at run time; repeatable."),
    ] = None,
    hub_allow: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="ORG/REPO, or a pattern, that admins may add adapters from; repeatable."),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that keeps the adapters and presets that admins add.")
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar="LORAMIX_KEYS_FILE", help="Keys that open this server, and their limits; see SECURITY.md."
        ),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
    replicas: Annotated[
        int, typer.Option(min=1, help="Servers on this machine behind one address, each with GPUs of its own; needs Ray.")
    ] = 1,
) -> None:
    """Serve MODEL with adapters, on vLLM's OpenAI-compatible server.

    Any further option goes to vLLM: --port, --max-loras (slots, 8 unless told otherwise), --max-lora-rank (room for any
    two of the adapters side by side unless told otherwise), --lora-target-modules (those of the adapters unless told
    otherwise), --api-key, --served-model-name, …
    """
    if log_json:
        to_json(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    settings = Settings.read(
        adapters=[path.resolve() for path in adapters or ()],
        adapter=_pairs("--adapter", adapter),
        presets={name: _absolute(recipe) for name, recipe in _pairs("--preset", preset).items()},
        default_method=default_method,
        skip_bad_adapters=skip_bad_adapters,
        merge_timeout=merge_timeout,
        merge_queue=merge_queue,
        cold_merges_per_minute=cold_merges_per_minute,
        max_adapters_per_recipe=max_adapters_per_recipe,
        max_body_mib=max_body_mib,
        adapter_host_gib=adapter_host_gib,
        adapter_gpu_gib=adapter_gpu_gib,
        cache_dir=cache_dir and cache_dir.resolve(),
        cache_disk_gib=cache_disk_gib,
        adapter_root=[path.resolve() for path in adapter_root or ()],
        hub_allow=hub_allow or [],
        state_dir=state_dir and state_dir.resolve(),
        keys_file=keys_file and keys_file.resolve(),
    )
    read_keys(settings.keys_file)  # what is wrong with them is said before the model is loaded
    check_model(model)
    check_memory(settings.adapter_host_bytes)
    if settings.cache_dir is not None:
        check_cache_dir(settings.cache_dir)
    Kept(settings.state_dir)
    ranks, targets = _survey(settings)
    if replicas > 1:
        from server.scale.local import run
        from server.scale.plan import own_words

        run([*own_words(context), *context.args], replicas)
        return
    for name, value in settings.model_dump(mode="json").items():
        os.environ[f"LORAMIX_{name.upper()}"] = value if isinstance(value, str) else json.dumps(value)
    from server.vllm_launch import legal_rank  # importing vLLM takes ten seconds
    from server.vllm_launch import serve as launch

    defaults = {"--max-lora-rank": [str(legal_rank(sum(sorted(ranks)[-2:]) or 16))]}
    if targets:
        defaults["--lora-target-modules"] = sorted(targets)
    own_options = [option for parameter in context.command.params for option in parameter.opts]
    launch(model, defaults, context.args, own_options, settings.adapter_gpu_bytes, log_json)


def _pairs(option: str, words: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {word}: write it as NAME=VALUE")
        if name in pairs:
            raise ConfigError(f"{option} {name} is given twice")
        pairs[name] = value
    return pairs


def _absolute(recipe: str) -> str:
    """A preset's recipe as the engine's process finds it; a file that is none is refused before the model is loaded."""
    if not names_file(recipe):
        return recipe
    path = Path(recipe).resolve()
    read_preset_file(path)
    return str(path)


def _survey(settings: Settings) -> tuple[list[int], set[str]]:
    """The rank of every adapter, and the kinds of modules that they target together.

    An adapter that is broken on its own is refused here, before the model is loaded.
    """
    ranks, targets = [], set()
    with ThreadPoolExecutor(_READERS) as pool:
        surveys = [pool.submit(survey, folder) for _, folder in adapter_folders(settings)]
        for checked in track(surveys, "Checking adapters", console=Console(stderr=True), transient=True):
            try:
                adapter = checked.result()
            except AdapterError as error:
                if not settings.skip_bad_adapters:
                    pool.shutdown(cancel_futures=True)
                    raise ConfigError(f"{error} (or start without it: --skip-bad-adapters)") from error
                continue
            ranks.append(adapter.rank)
            targets |= {name.rpartition(".")[2] for name in adapter.shapes}
    return ranks, targets
