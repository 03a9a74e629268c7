"""On base weights that vLLM quantises as it loads them, a composition is what its offline merge is.

Both are served beside the same quantised weights, so that only the merges can differ.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live import LiveServer, serve_command
from logprobs import ROUNDED, TEXT, distance, save_offline, served_logprobs
from transformers import AutoTokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM quantises to fp8 on a CUDA device only")

RECIPES = {
    "offline-cat": "cat(all*0.5+attn*0.3)",
    "offline-lego": "lego-8(all*0.5+attn*0.3)",
    "offline-svd": "svd-8(all*0.5+mlp)",
}


@pytest.fixture(scope="module")
def quantized(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("offline")
    for name, recipe in RECIPES.items():
        save_offline(adapters, recipe, root / name, device="cuda")
    options = ["--adapters", str(adapters), "--adapters", str(root), "--max-lora-rank", "16", "--quantization", "fp8"]
    with LiveServer(serve_command(model, *options), tmp_path_factory.mktemp("quantized") / "log") as live:
        yield live


@pytest.mark.parametrize("name", RECIPES)
def test_a_composition_is_its_offline_merge(quantized: LiveServer, model: Path, name: str) -> None:
    tokens = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    served = served_logprobs(quantized, RECIPES[name], tokens)
    assert distance(served, served_logprobs(quantized, name, tokens)) < ROUNDED / 3
    assert distance(served, served_logprobs(quantized, "smollm2", tokens)) > 2 * ROUNDED
