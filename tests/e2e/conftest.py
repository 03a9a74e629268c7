"""One server for all end-to-end tests: SmolLM2 with three random adapters of different ranks, targets and scalings."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live import LiveServer, example_model, serve_command
from openai import OpenAI
from safetensors.torch import save_file
from tiny import save_tiny_model

SLOTS = 3  # for adapters; on the CPU one more stays empty
LAYERS = 30
SHAPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
}  # fmt: skip


def write_adapter(folder: Path, seed: int, rank: int, targets: str, size: float, **config: object) -> None:
    """A random PEFT folder whose every ΔW has entries of about `size` / √d_in: large enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear", "bias": "none", **config}
    tensors = {}
    for layer in range(LAYERS):
        for kind, (d_out, d_in) in SHAPES.items():
            if targets in kind:
                name = f"model.layers.{layer}.{kind}"
                r = settings.get("rank_pattern", {}).get(kind.split(".")[1], rank)  # type: ignore[attr-defined]
                a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
                tensors[f"base_model.model.{name}.lora_A.weight"] = (a / d_in**0.5).bfloat16()
                tensors[f"base_model.model.{name}.lora_B.weight"] = (b * size / r**0.5).bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def model() -> Path:
    return example_model()


@pytest.fixture(scope="session")
def tiny(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with four heads and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, model)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`all`: every linear layer; `attn`: attention with rank and alpha patterns; `mlp`: rsLoRA."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "all", 1, 8, "", 0.4, lora_alpha=12)
    write_adapter(root / "attn", 2, 4, "attn", 0.6, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 8})
    write_adapter(root / "mlp", 3, 8, "mlp", 0.2, use_rslora=True)
    write_adapter(root / "twin", 4, 8, "", 0.4)
    return root


@pytest.fixture(scope="session")
def server(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    options = [
        "--adapters", str(adapters), "--preset", "blend=lego-8(all+mlp*0.5)", "--max-loras", str(SLOTS + 1),
        "--max-lora-rank", "16", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        # A random adapter may go on with blanks for ever, where JSON lets it.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    with LiveServer(serve_command(model, *options), tmp_path_factory.mktemp("server") / "log") as live:
        yield live


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
