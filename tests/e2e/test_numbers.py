"""What is served is what the recipe says: log-probabilities of a whole text against transformers.

Two servers: one in float32, where nothing but the order of sums may differ, and one in bfloat16, as users run it.
"""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from live import LiveServer, serve_command
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from merging import load_adapter, merge, save_adapter
from server.grammar import parse_expression

TEXT = (
    "The ship had been at sea for forty days when the cook, who had never been wrong about the weather, "
    "looked at the clouds and said that 17 plus 25 makes 42. Nobody on board could say why that mattered."
)
# Mean difference of log-probabilities from a float32 reference. In float32 only the order of sums differs (seen: 2e-5);
# bfloat16 alone makes 0.04 on the plain base model.
EXACT, ROUNDED = 1e-4, 0.09


@pytest.fixture(scope="module")
def exact(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = serve_command(model, "--adapters", str(adapters), "--max-lora-rank", "16", "--dtype", "float32")
    with LiveServer(command, tmp_path_factory.mktemp("exact") / "log") as live:
        yield live


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]  # type: ignore[no-any-return]


def base(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def logprobs_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The log-probability of each token after the first, given those before it."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)


def served_logprobs(server: LiveServer, recipe: str, tokens: list[int]) -> torch.Tensor:
    body = {"model": recipe, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    choice = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()["choices"][0]
    return torch.tensor(
        [position[str(token)]["logprob"] for position, token in zip(choice["prompt_logprobs"][1:], tokens[1:], strict=True)]
    )


def with_dense_deltas(model: Path, adapters: Path, weights: dict[str, float]) -> PreTrainedModel:
    """The base model with Σ w ΔW added to its weights, module by module, in float64."""
    network = base(model)
    for name, weight in weights.items():
        for module, factors in load_adapter(adapters / name).modules.items():
            target = network.get_submodule(module).weight
            target.data = (target.data.double() + weight * factors.delta()).float()
    return network


def cat_of(weights: dict[str, float]) -> str:
    return f"cat({'+'.join(f'{name}*{weight}' for name, weight in weights.items())})"


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().mean().item()


@pytest.mark.parametrize("weights", [{"all": 0.7, "attn": 0.3}, {"all": 0.5, "attn": 1.0, "mlp": -0.8}, {"mlp": 1.0}])
def test_a_served_cat_is_the_base_plus_the_weighted_sum(
    exact: LiveServer, model: Path, adapters: Path, tokens: list[int], weights: dict[str, float]
) -> None:
    served = served_logprobs(exact, cat_of(weights), tokens)
    assert distance(served, logprobs_of(with_dense_deltas(model, adapters, weights), tokens)) < EXACT
    slightly_off = {name: weight * 1.02 for name, weight in weights.items()}
    assert distance(served, logprobs_of(with_dense_deltas(model, adapters, slightly_off), tokens)) > 10 * EXACT


@pytest.mark.parametrize(
    "recipe", ["lego-8(all+attn*0.5+mlp)", "svd-6(all+mlp*-0.5)", "linear(all*0.6+twin*0.4)", "cat(all+mlp)"]
)
def test_what_is_served_equals_what_is_merged_offline_and_loaded_by_peft(
    exact: LiveServer, model: Path, adapters: Path, tokens: list[int], recipe: str, tmp_path: Path
) -> None:
    spec = parse_expression(recipe, "cat")
    sources = {term.adapter: load_adapter(adapters / term.adapter) for term in spec.terms}
    save_adapter(merge(sources, spec, dtype=torch.float32), tmp_path / "merged")
    offline = PeftModel.from_pretrained(base(model), tmp_path / "merged").eval()
    assert distance(served_logprobs(exact, recipe, tokens), logprobs_of(offline, tokens)) < EXACT


@pytest.mark.parametrize("recipe", ["lego-8(all*0.5+attn*0.3)", "svd-8(all*0.5+mlp*-0.5)", "linear(all*0.3+twin*0.3)"])
def test_in_bfloat16_every_method_agrees_with_the_offline_merge_within_rounding(
    server: LiveServer, model: Path, adapters: Path, tokens: list[int], recipe: str, tmp_path: Path
) -> None:
    spec = parse_expression(recipe, "cat")
    save_adapter(merge({t.adapter: load_adapter(adapters / t.adapter) for t in spec.terms}, spec), tmp_path / "merged")
    offline = PeftModel.from_pretrained(base(model), tmp_path / "merged").eval()
    served = served_logprobs(server, recipe, tokens)
    assert distance(served, logprobs_of(offline, tokens)) < ROUNDED
    assert distance(served, logprobs_of(base(model), tokens)) > 2 * ROUNDED


def test_the_base_model_is_served_as_it_is(exact: LiveServer, model: Path, tokens: list[int]) -> None:
    assert distance(served_logprobs(exact, "smollm2", tokens), logprobs_of(base(model), tokens)) < EXACT


def test_in_bfloat16_log_probabilities_and_top_tokens_agree_within_rounding(
    server: LiveServer, model: Path, adapters: Path, tokens: list[int]
) -> None:
    weights = {"all": 0.7, "attn": 0.3}
    network = with_dense_deltas(model, adapters, weights)
    served = served_logprobs(server, cat_of(weights), tokens)
    assert distance(served, logprobs_of(network, tokens)) < ROUNDED
    assert distance(served, logprobs_of(base(model), tokens)) > 5 * ROUNDED
    body = {"model": cat_of(weights), "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    choice = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status().json()["choices"][0]
    with torch.inference_mode():
        expected = network(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).topk(5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    top = choice["logprobs"]["top_logprobs"][0]
    assert tokenizer.decode(expected.indices[0]) == max(top, key=top.__getitem__)
    for index, value in zip(expected.indices[:3], expected.values[:3], strict=True):
        assert top[tokenizer.decode(index)] == pytest.approx(value.item(), abs=0.3)
