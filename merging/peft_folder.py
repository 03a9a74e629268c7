"""PEFT folders: read one as a checked LoraAdapter, write one atomically.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Pickled weights are refused, and so is
every LoRA variant whose ΔW is not scaling · B A: what loramix serves is exactly what the folder says.
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from merging.adapter import DTYPES, LoraAdapter, LoraModule, bits
from merging.errors import AdapterError, OutputError, shown
from merging.exchange import exchange

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")

# Settings of PEFT's LoraConfig that say how an adapter was trained or where it goes, but not what it computes.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules "
    "inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout "
    "lora_ga_config megatron_core monteclora_config peft_type peft_version qalora_group_size r rank_pattern "
    "alpha_pattern revision runtime_config target_modules task_type use_rslora velora_config".split()
)
# Settings that change what an adapter computes, with the name users know them by.
_VARIANTS = {
    "use_dora": "DoRA", "lora_bias": "LoRA bias", "modules_to_save": "fully trained modules",
    "alora_invocation_tokens": "activated LoRA", "layer_replication": "layer replication",
    "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow routing",
    "kasa_config": "KaSA", "trainable_token_indices": "trained tokens", "target_parameters": "target parameters",
    "fan_in_fan_out": "transposed (fan_in_fan_out) weights", "megatron_config": "Megatron layers",
}  # fmt: skip
# Initialisations that move part of the base weights into the adapter: B A alone is not ΔW until it is converted.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(folder: Path | str) -> LoraAdapter:
    """Read and check a PEFT folder; tensors land on the CPU in the dtype they are stored in, stacked for merging.

    Raises:
        AdapterError: naming the folder, what is wrong with it and what to do.
    """
    return read_adapter(folder).to("cpu")


def read_adapter(folder: Path | str) -> LoraAdapter:
    """As `load_adapter`, each tensor as it lies in the file: all that looking at an adapter takes."""
    folder = Path(folder)
    try:
        return parse_adapter(*_read_files(folder))
    except AdapterError as error:
        raise AdapterError(f"adapter {folder}: {error}") from error


def parse_adapter(config: bytes, weights: bytes) -> LoraAdapter:
    """The adapter of a folder's two files, checked as `load_adapter` does, each tensor as it lies in the file.

    Raises:
        AdapterError: what is wrong and what to do.
    """
    settings = _parse_config(config)
    return LoraAdapter(_pair(_parse_tensors(weights), settings), base_model=settings.get("base_model_name_or_path"))


def save_adapter(adapter: LoraAdapter, folder: Path | str, *, replace: bool = False) -> None:
    """Write `adapter` as a PEFT folder that PEFT and vLLM load; all of it or nothing.

    The folder is written beside its place and renamed, so no reader ever meets half of one. Scalings must be 1
    (as `merge` returns them).

    Args:
        replace: exchange an existing folder for the new one, in one step where the system can.

    Raises:
        OutputError: where a factor holds values that its dtype cannot (the merge overflowed).
        FileExistsError: if `folder` exists and may not be replaced.
        OSError: if the disk refuses; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} exists; choose another folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private
        tensors = {}
        for name, module in adapter.modules.items():
            assert module.scaling == 1, f"{name}: fold the scaling into the factors before saving"
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.a.cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.b.cpu().contiguous()
        if (broken := _not_finite(tensors)) is not None:
            dtype = str(tensors[broken].dtype).removeprefix("torch.")
            raise OutputError(f"{broken} holds values too large for {dtype}; merge with --dtype float32")
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(_config_of(adapter), indent=2) + "\n")
        if replace and folder.exists():
            exchange(scratch, folder)
            shutil.rmtree(scratch)
        else:
            os.replace(scratch, folder)
    except SafetensorError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(str(error)) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _read_files(folder: Path) -> tuple[bytes, bytes]:
    """The contents of CONFIG and WEIGHTS. Not mapped: this process would end if another one cut a mapped file off."""
    if not os.path.isdir(folder):  # Path.is_dir raises for a path that is too long
        raise AdapterError("no such folder; check the path")
    if not os.path.isfile(folder / CONFIG):  # nor a pipe, which would be waited for, nor a device, which never ends
        raise AdapterError(f"{CONFIG} is missing or no file; name a folder that PEFT's save_pretrained wrote")
    if not os.path.isfile(folder / WEIGHTS):
        pickled = sorted(str(p.name) for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
        if pickled:
            raise AdapterError(f"weights are pickled ({pickled[0]}), which can run code; save them as {WEIGHTS}")
        raise AdapterError(f"{WEIGHTS} is missing or no file; copy it from where the adapter was saved")
    return _read(folder / CONFIG), _read(folder / WEIGHTS)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise AdapterError(f"{file.name} cannot be read ({error}); copy it again") from error


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} cannot be read ({error}); copy it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(f"peft_type is {shown(kind)}; only LORA adapters can be merged, train one of those")
    for key, value in config.items():
        if key in _VARIANTS and value:
            raise AdapterError(f"{key}={shown(value)}: {_VARIANTS[key]} is not supported; train a plain LoRA instead")
        if key == "bias" and value != "none":
            raise AdapterError(f"bias={shown(value)} is not supported; train with bias='none'")
        if key not in _HARMLESS and key not in _VARIANTS and key != "bias" and value:
            raise AdapterError(
                f"{CONFIG} sets {key}={shown(value)}, which this version does not know and so will not guess at; "
                "remove it if it does not change what the adapter computes"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"init_lora_weights={init!r} changes the base model's weights; "
            "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    _check_number("r", config.get("r"), whole=True)
    _check_number("lora_alpha", config.get("lora_alpha"), whole=False)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{key}={shown(patterns)} in {CONFIG} must map module names to numbers; correct it")
        for pattern, value in patterns.items():
            _check_number(f"{key}[{shown(pattern)}]", value, whole=key == "rank_pattern")
            try:
                re.compile(pattern)
                _ending(pattern)  # (?i) is right alone and wrong in the middle
            except (re.error, OverflowError, RecursionError) as error:  # not all that is too much for re is a re.error
                raise AdapterError(
                    f"{key} in {CONFIG} has {shown(pattern)}, no regular expression ({error}); correct it"
                ) from error
    for key, kind, name in (
        ("use_rslora", bool, "bool"), ("base_model_name_or_path", str, "str"), ("init_lora_weights", bool | str, "bool or str")
    ):  # fmt: skip
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise AdapterError(f"{key}={shown(config[key])} in {CONFIG} must be {name}; correct it")
    return config


def _check_number(key: str, value: object, *, whole: bool) -> None:
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool) or not 0 < value < sys.float_info.max:
        raise AdapterError(
            f"{key}={shown(value)} in {CONFIG} must be a positive number{', a whole one' if whole else ''}; correct it"
        )


def _parse_tensors(content: bytes) -> dict[str, Tensor]:
    try:
        tensors = dict(sorted(load(content).items()))  # they come in any order; the first complaint is to be the same each time
    except KeyError as error:  # of a dtype that the format has and torch has not
        raise AdapterError(f"{WEIGHTS} holds tensors of {error.args[0]}; expected one of {', '.join(DTYPES)}") from error
    except (SafetensorError, TypeError, RuntimeError) as error:  # the latter by torch: no tensor can have such a shape
        raise AdapterError(f"{WEIGHTS} is truncated or not a safetensors file ({error}); copy it again") from error
    for key, tensor in tensors.items():
        if _KEY.fullmatch(key.removeprefix(PREFIX)) is None or tensor.ndim != 2:
            raise AdapterError(
                f"{key} {shown(tuple(tensor.shape))} is not a LoRA factor of a linear layer, which is all that can be merged; "
                "train without it"
            )
        if not tensor.numel():
            raise AdapterError(f"{key} {tuple(tensor.shape)} is empty; save the adapter again")
        if tensor.dtype not in DTYPES.values():
            raise AdapterError(f"{key} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    if (broken := _not_finite(tensors)) is not None:
        raise AdapterError(f"{broken} holds NaN or infinite values; train or export the adapter again")
    return tensors


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinite values, if one does: their exponents have all bits set."""
    for name, tensor in tensors.items():
        exponent = int(bits(torch.tensor(torch.inf, dtype=tensor.dtype)))
        if tensor.numel() and np.bitwise_and(bits(tensor), exponent).max() == exponent:
            return name
    return None


def _pair(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, LoraModule]:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        assert match is not None
        factor = factors.setdefault(match["module"], {})
        if match["factor"] in factor:
            raise AdapterError(f"{key} stands for a factor that another tensor has already; save the adapter again")
        factor[match["factor"]] = tensor
    if not factors:
        raise AdapterError(f"{WEIGHTS} holds no tensors; save the adapter again")
    modules = {}
    for name in sorted(factors):
        pair = factors[name]
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{name} has only lora_{next(iter(pair))}; both factors are needed, save it again")
        a, b = pair["A"], pair["B"]
        rank = _pattern(config.get("rank_pattern"), name, config["r"])
        if a.shape[0] != rank or b.shape[1] != rank or a.dtype != b.dtype:
            raise AdapterError(
                f"{name}: A is {tuple(a.shape)} {a.dtype} and B {tuple(b.shape)} {b.dtype}, "
                f"but {CONFIG} says rank {rank} and the dtypes must agree"
            )
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        modules[name] = LoraModule(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return modules


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the name at a dot, as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if _ending(pattern).match(module):
            return value
    return default


def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _config_of(adapter: LoraAdapter) -> dict[str, Any]:
    """PEFT's configuration for an adapter with scaling 1: alpha equals rank, module by module."""
    rank = adapter.rank
    # Patterns match the ends of names; anchored, one module's cannot match another's.
    pattern = {f"^{name}": module.rank for name, module in adapter.modules.items() if module.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(adapter.modules),
    }
