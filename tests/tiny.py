"""A tiny model with random adapters, for tests that need a real server, but no sense: no two adapters say the same."""

from pathlib import Path

import torch
from live import LiveServer, serve_command
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from merging import LoraAdapter, LoraModule, save_adapter

CONFIG = LlamaConfig(
    vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024, initializer_range=0.06,
)  # fmt: skip


def save_tiny_model(folder: Path, tokenizer: Path) -> None:
    """Write a random Llama with the tokenizer of another model's folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def save_tiny_adapter(folder: Path, seed: int, rank: int, size: float = 0.7) -> None:
    """Write a random adapter of every linear layer, whose ΔW has entries of about `size` / √d_in: it changes what is said."""
    with torch.device("meta"):
        linears = {name: layer.weight.shape for name, layer in LlamaForCausalLM(CONFIG).named_modules() if "_proj" in name}
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (d_out, d_in) in linears.items():
        a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        modules[name] = LoraModule((a / d_in**0.5).bfloat16(), (size * b / rank**0.5).bfloat16())
    save_adapter(LoraAdapter(modules), folder)


def tiny_server(
    model: Path,
    adapters: Path,
    log: Path,
    *options: str,
    slots: int = 7,
    rank: int = 16,
    environment: dict[str, str] | None = None,
) -> LiveServer:
    """A server of the tiny model in float32, so that it can be compared closely; on the CPU one more slot stays empty."""
    fixed = ["--adapters", str(adapters), "--max-lora-rank", str(rank), "--max-loras", str(slots + 1), "--dtype", "float32"]
    return LiveServer(serve_command(model, *fixed, "--enforce-eager", *options), log, environment)
