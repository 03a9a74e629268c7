"""A model and data for the study of compositions, small enough for tests: bytes as tokens, a Llama of two layers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import benchmarks.composition  # noqa: F401  (puts the examples' modules on the path)

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and the two of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _tiny_model(seed: int = 0, hidden: int = 32) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Of torch: for matrices this small more of them only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return _tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("model")
    _tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files laid out as the public ones are, with a few made-up examples each."""
    folder = tmp_path_factory.mktemp("data")
    words = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgkmnpt"]
    answers = {
        "singular_to_plural": lambda word: word + "s", "antonyms": lambda word: "un" + word,
        "larger_animal": lambda word: word, "negation": lambda word: f"not {word}.", "active_to_passive": lambda w: f"by {w}.",
        "first_word_letter": lambda word: word[0], "sentiment": lambda word: "positive" if word < "m" else "negative",
        "translation_en-de": str.upper,
    }  # fmt: skip
    tasks = {task: {word: answer(word) for word in words} for task, answer in answers.items()}
    pairs = [(x, y) for x in range(20) for y in range(x, 20)]
    tasks["sum"] = {f"{x} {y}": str(x + y) for x, y in pairs}
    tasks["diff"] = {f"{y} {x}": str(y - x) for x, y in pairs}
    tasks["num_to_verbal"] = {str(n): "n" * (n % 5 + 1) for n in range(100)}
    for task, examples in tasks.items():
        rows = [{"input": prompt, "output": answer} for prompt, answer in examples.items()]
        for name, part in (("induce", rows[5:]), ("execute", rows[:5] + rows[5:7])):  # two stand in both
            path = folder / "instruction-induction" / name / f"{task}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"examples": {str(i): row for i, row in enumerate(part)}}))
    asked = [{"instruction": f"question: is {word} a word?\n", "answer": "true"} for word in words]
    (folder / "llm-adapters" / "boolq").mkdir(parents=True)
    (folder / "llm-adapters" / "boolq" / "train.json").write_text(json.dumps(asked))
    return folder
