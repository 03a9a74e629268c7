"""A tiny Llama with real PEFT adapters on it."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapters(base: LlamaForCausalLM, configs: dict[str, LoraConfig]) -> PeftModel:
    """PEFT's model with an adapter under each name, its factors random (B too, which PEFT starts at zero)."""
    first, *others = configs
    model = get_peft_model(copy.deepcopy(base), configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(model: PeftModel, name: str, folder: Path) -> Path:
    """One adapter of the model, written by PEFT."""
    model.save_pretrained(folder / "peft", selected_adapters=[name])
    return folder / "peft" / name if name != "default" else folder / "peft"


def peft_deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """ΔW of every module as PEFT itself computes it, by the base model's name of the module."""
    return {
        key.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().double()
        for key, layer in model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(24).reshape(2, 12) % 40
    with torch.no_grad():
        return model(tokens).logits


def with_deltas(base: LlamaForCausalLM, deltas: dict[str, Tensor]) -> LlamaForCausalLM:
    """The base with the dense ΔW added to its weights: no adapter left."""
    model = copy.deepcopy(base)
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.data.double() + delta).float()
    return model
