"""PEFT folders written by hand, so that reading is tested against the format and not against our own writing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from merging import AdapterError, LoraAdapter, load_adapter

PREFIX = "base_model.model."
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"

CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 4, "bias": "none"}


def factors(rank: int = 2, module: str = Q, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, 6, generator=generator).to(dtype),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(8, rank, generator=generator).to(dtype),
    }


def write_folder(folder: Path, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A folder with CONFIG, changed by `config`, and `tensors`."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(dict(factors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def read_or_refusal(folder: Path) -> LoraAdapter | str:
    """The adapter in a folder, or the refusal: one line that names it."""
    try:
        return load_adapter(folder)
    except AdapterError as error:
        message = str(error)
    assert message.isprintable()
    assert message.startswith(f"adapter {folder}: ")
    return message
