"""What is served is what the recipe says: log-probabilities of a whole text against transformers.

Two servers: one in float32, where nothing but the order of sums may differ, and one in bfloat16, as users run it.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from live import LiveServer, serve_command
from logprobs import EXACT, ROUNDED, TEXT, base, distance, logprobs_of, served_logprobs, with_dense_deltas, with_offline_merge
from transformers import AutoTokenizer

from merging import MergeSpec, Term, load_adapter
from server.preset_file import PresetFile, save_preset_file


def learned_weight(module: str) -> float:
    """As `loramix fit` could have learned it: another one for each module, some of them negative."""
    return round(0.8 * math.sin(len(module) + int(module.split(".")[2])), 4)


@pytest.fixture(scope="module")
def exact(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With a preset file, whose weights differ from module to module."""
    both = {name: load_adapter(adapters / name) for name in ("all", "mlp")}
    terms = [
        Term.of("all", {module: learned_weight(module) for module in both["all"].modules}),
        Term("mlp", 0.5),
    ]
    file = tmp_path_factory.mktemp("presets") / "learned.json"
    digests = {name: adapter.digest for name, adapter in both.items()}
    save_preset_file(PresetFile.of(MergeSpec.create("cat", terms), digests, {}), file)
    options = ["--adapters", str(adapters), "--preset", f"learned={file}", "--max-lora-rank", "16", "--dtype", "float32"]
    with LiveServer(serve_command(model, *options), tmp_path_factory.mktemp("exact") / "log") as live:
        yield live


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]  # type: ignore[no-any-return]


def cat_of(weights: dict[str, float]) -> str:
    return f"cat({'+'.join(f'{name}*{weight}' for name, weight in weights.items())})"


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
    offline = with_offline_merge(model, adapters, recipe, tmp_path / "merged", dtype=torch.float32)
    assert distance(served_logprobs(exact, recipe, tokens), logprobs_of(offline, tokens)) < EXACT


@pytest.mark.parametrize("recipe", ["lego-8(all*0.5+attn*0.3)", "svd-8(all*0.5+mlp*-0.5)", "linear(all*0.3+twin*0.3)"])
def test_in_bfloat16_every_method_agrees_with_the_offline_merge_within_rounding(
    server: LiveServer, model: Path, adapters: Path, tokens: list[int], recipe: str, tmp_path: Path
) -> None:
    offline = with_offline_merge(model, adapters, recipe, tmp_path / "merged")
    served = served_logprobs(server, recipe, tokens)
    assert distance(served, logprobs_of(offline, tokens)) < ROUNDED
    assert distance(served, logprobs_of(base(model), tokens)) > 2 * ROUNDED


def test_a_preset_file_is_served_with_the_weight_of_each_module(
    exact: LiveServer, model: Path, adapters: Path, tokens: list[int]
) -> None:
    served = served_logprobs(exact, "learned", tokens)
    dense = with_dense_deltas(model, adapters, {"all": learned_weight, "mlp": 0.5})
    assert distance(served, logprobs_of(dense, tokens)) < EXACT
    uniform = with_dense_deltas(model, adapters, {"all": 0.5, "mlp": 0.5})
    assert distance(served, logprobs_of(uniform, tokens)) > 10 * EXACT


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
