"""Log-probabilities of a text, from a server and from transformers, for the tests of what is served."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from live import LiveServer
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from merging import load_adapter, merge, save_adapter
from server.grammar import parse_expression

TEXT = (
    "The ship had been at sea for forty days when the cook, who had never been wrong about the weather, "
    "looked at the clouds and said that 17 plus 25 makes 42. Nobody on board could say why that mattered."
)
# Mean difference of log-probabilities from a float32 reference. In float32 only the order of sums differs (seen: 2e-5);
# bfloat16 alone makes 0.04 on the plain base model.
EXACT, ROUNDED = 1e-4, 0.09


def base(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def with_dense_deltas(model: Path, adapters: Path, weights: Mapping[str, float | Callable[[str], float]]) -> PreTrainedModel:
    """The base model with Σ w ΔW added to its weights, module by module, in float64; a weight may depend on the module."""
    network = base(model)
    for name, weight in weights.items():
        for module, factors in load_adapter(adapters / name).modules.items():
            target = network.get_submodule(module).weight
            here = weight(module) if callable(weight) else weight
            target.data = (target.data.double() + here * factors.delta()).float()
    return network


def save_offline(adapters: Path, recipe: str, folder: Path, **how: Any) -> None:
    """Write what a recipe merges to; `how` as of `merge`."""
    spec = parse_expression(recipe, "cat")
    sources = {term.adapter: load_adapter(adapters / term.adapter) for term in spec.terms}
    save_adapter(merge(sources, spec, **how), folder)


def with_offline_merge(model: Path, adapters: Path, recipe: str, folder: Path, **how: Any) -> PeftModel:
    """The base model with what `save_offline` writes, loaded by PEFT."""
    save_offline(adapters, recipe, folder, **how)
    return PeftModel.from_pretrained(base(model), folder).eval()


def logprobs_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The log-probability of each token after the first, given those before it."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


def served_logprobs(server: LiveServer, recipe: str, tokens: list[int], key: str = "none") -> torch.Tensor:
    body = {"model": recipe, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    headers = {"x-api-key": key}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)
    choice = reply.raise_for_status().json()["choices"][0]
    return torch.tensor(
        [position[str(token)]["logprob"] for position, token in zip(choice["prompt_logprobs"][1:], tokens[1:], strict=True)]
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().mean().item()
