"""A toy of composition whose right weights are known: rows that the base says with one adapter, beside one that harms."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from reference.adapters import random_adapter
from reference.peft_model import tiny_llama, with_deltas
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from merging import LoraAdapter, LoraModule, save_adapter
from merging.fit import Rows

PROMPT = 2  # tokens


@dataclass(frozen=True)
class Toy:
    """`rows` are said by `model` with "good" at weight 1; "bad" is of another rank, and has nothing to do with them."""

    model: LlamaForCausalLM
    adapters: dict[str, LoraAdapter]
    rows: Rows


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear layers in the decoder's layers."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy() -> Toy:
    model = tiny_llama()
    shapes = linear_shapes(model)
    adapters = {"good": random_adapter(1, 4, alpha=0.8, shapes=shapes), "bad": random_adapter(2, 3, alpha=0.6, shapes=shapes)}
    teacher = with_deltas(model, {name: module.delta() for name, module in adapters["good"].modules.items()})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (256, PROMPT), generator=generator)
    with torch.no_grad():
        for _ in range(20):
            chances = teacher(ids).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return Toy(model, adapters, Rows(ids.tolist(), [PROMPT] * len(ids)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word w7 is token 7; no end token, no chat template."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture
def workplace(toy: Toy, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """`model`, `adapters/good`, `adapters/bad` and `data.jsonl` of the toy."""
    toy.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, adapter in toy.adapters.items():
        folded = {path: LoraModule(part.a, part.scaling * part.b) for path, part in adapter.modules.items()}
        save_adapter(LoraAdapter(folded, "tiny"), tmp_path / "adapters" / name)
    lines = [
        {"prompt": " ".join(f"w{i}" for i in ids[:PROMPT]), "answer": " ".join(f"w{i}" for i in ids[PROMPT:])}
        for ids in toy.rows.ids
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path
