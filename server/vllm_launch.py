"""`loramix serve` -> vLLM's own server with the right settings."""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, NoReturn

import uvloop
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from merging.errors import nearest
from server.errors import ConfigError
from server.keys import refuse_vllms_keys
from server.logs import to_json
from server.preflight import check_port, check_slots
from server.start_fault import told
from server.tuning import FOLDER as TUNED

# vLLM's LoRA kernels are built for these ranks.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_WORKER = "server.vllm_worker.LoramixWorker"
_DRAIN_SECONDS = "30"  # for running requests to end once the server is told to stop


def legal_rank(rank: int) -> int:
    """The smallest rank limit of vLLM's that is at least `rank`."""
    if rank > RANKS[-1]:
        raise ConfigError(f"rank {rank} is over {RANKS[-1]}, the largest that vLLM serves")
    return next(legal for legal in RANKS if legal >= rank)


def serve(
    model: str,
    defaults: Mapping[str, Sequence[str]],
    options: Sequence[str],
    own_options: Sequence[str],
    adapter_gpu_bytes: int,
    log_json: bool = False,
) -> None:
    """Run vLLM's OpenAI server with loramix in it, until it is told to stop.

    Args:
        model: anything that vLLM takes as one.
        defaults: vLLM's options with their values, for those that `options` does not have.
        options: vLLM's own options, as on its command line.
        own_options: names of loramix's options, to suggest one for a name that neither has.
        adapter_gpu_bytes: of each GPU's memory, to be left to the adapter store.
        log_json: whether this process logs JSON (see server/logs.py).

    Raises:
        ConfigError: for an option that vLLM does not have or cannot read, or one that loramix sets itself; where no memory is
            left to vLLM; where loramix is on the path, but not installed; where both have keys; where it cannot listen; where
            vLLM does not come up.
    """
    if not entry_points(group="vllm.endpoint_plugins", name="loramix"):
        raise ConfigError(
            "loramix is not installed here, so that vLLM would serve without it; pip install it, -e . in a checkout"
        )
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, "loramix"]))
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does
    # What Python's resource tracker has to say once an engine that failed is gone would stand below the reason.
    said = [os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, said))
    args = _parse(model, defaults, options, own_options)
    refuse_vllms_keys(args)
    check_slots(args.max_loras, fewest=2 if current_platform.is_cpu() else 1)
    if not args.uds:
        check_port(args.host, args.port)
    _leave_memory(args, adapter_gpu_bytes)
    if current_platform.is_cuda():
        os.environ.setdefault("VLLM_LORA_ENABLE_DUAL_STREAM", "1")  # LoRA beside the base layer: benchmarks/README.md
        if any(TUNED.glob("*.json")):
            os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(TUNED))
    entry = import_module(_first("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server"))
    options_of_uvicorn = _log_json(args) if log_json else {}
    with told():
        uvloop.run(entry.run_server(args, **options_of_uvicorn))


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        """In one line, without the 300 lines of vLLM's usage."""
        raise ConfigError(message)


def _parse(
    model: str, defaults: Mapping[str, Sequence[str]], options: Sequence[str], own_options: Sequence[str]
) -> argparse.Namespace:
    cli_args = import_module(_first("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"))
    parser = cli_args.make_arg_parser(_Parser(prog="loramix serve", add_help=False))
    given = {word.split("=")[0].replace("_", "-") for word in options if word.startswith("--")}
    for owned in ("--worker-extension-cls", "--max-cpu-loras", "--lora-modules"):
        if owned in given:
            raise ConfigError(f"{owned} is set by loramix; adapters are named with --adapters and --adapter")
    settled = {
        "--host": ["127.0.0.1"],
        "--max-loras": ["8"],
        "--shutdown-timeout": [_DRAIN_SECONDS],
        **defaults,
        "--worker-extension-cls": [_WORKER],
    }
    words = [word for option, values in settled.items() if option not in given for word in (option, *values)]
    args, unknown = parser.parse_known_args([model, *options, *words, "--enable-lora"])
    strange = [word for word in unknown if word.startswith("-")] or unknown
    if strange:
        known = [*own_options, *(option for action in parser._actions for option in action.option_strings)]
        option = strange[0].split("=")[0]  # its value may be a key
        raise ConfigError(f"unknown option {option}{nearest(option, known)}")
    args.model = model
    args.max_cpu_loras = args.max_loras  # loramix owns the slots: what is registered is active
    cli_args.validate_parsed_serve_args(args)
    return args  # type: ignore[no-any-return]


def _log_json(args: argparse.Namespace) -> dict[str, Any]:
    """Have vLLM's options for logs count where our file says how to log; returns options of uvicorn's."""
    if getattr(args, "log_level", None) is not None:
        to_json(args.log_level)
    if args.disable_access_log_for_endpoints:
        from vllm.logging_utils import UvicornAccessLogFilter

        paths = [path.strip() for path in args.disable_access_log_for_endpoints.split(",")]
        logging.getLogger("uvicorn.access").addFilter(UvicornAccessLogFilter(paths))
    return {"log_config": None}  # uvicorn's lines go where all others go


def _leave_memory(args: argparse.Namespace, adapter_gpu_bytes: int) -> None:
    """Have vLLM size its KV cache for a GPU that is smaller by what the adapter store will take."""
    if not current_platform.is_cuda():
        return
    total = current_platform.get_device_total_memory()  # asks NVML; a CUDA context here would hinder the workers
    left = args.gpu_memory_utilization - adapter_gpu_bytes / total
    if left <= 0:
        raise ConfigError(
            f"--adapter-gpu-gib {adapter_gpu_bytes / 2**30:g} leaves nothing of --gpu-memory-utilization "
            f"{args.gpu_memory_utilization:g} ({total / 2**30:.0f} GiB in all); use less"
        )
    args.gpu_memory_utilization = left


def _first(*modules: str) -> str:
    """The first module that this vLLM has: its files under `entrypoints` move between versions."""
    for module in modules:
        try:
            if find_spec(module) is not None:
                return module
        except ModuleNotFoundError:
            continue
    raise ConfigError(f"this vLLM has none of {', '.join(modules)}; use a version from 0.26 to 0.33")
