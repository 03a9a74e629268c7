"""The model that `loramix fit` learns weights on, loaded with transformers."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from merging.fit import FitError


def load_tokenizer(folder: Path) -> tuple[Any, int]:
    """The tokenizer of a model's folder, and the model's context length in tokens. Raises FitError."""
    if importlib.util.find_spec("transformers") is None:
        raise FitError("fitting needs transformers: pip install 'loramix[fit]'")
    if not (folder / "config.json").is_file():
        raise FitError(f"{folder} holds no model (no config.json); --model takes the folder of a model of transformers")
    from transformers import AutoConfig, AutoTokenizer  # an extra, and slow to import

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), config.max_position_embeddings
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def load_model(folder: Path, device: torch.device) -> Any:
    """The causal language model of a folder, in bfloat16 on a GPU and float32 on a CPU. Raises FitError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product on a GPU: the same bytes each time
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # A CPU without bfloat16 units emulates them at a tenth of float32's speed.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return model.to(device)


def _unreadable(folder: Path, error: Exception) -> FitError:
    return FitError(f"{folder} cannot be loaded ({str(error).strip().splitlines()[0]}); give a model of transformers")
