"""What lies on disk before servers start: the model, random adapters, and merged ones for vLLM's own loading."""

import json
import math
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.adapters import random_adapter
from benchmarks.serving.traffic import recipes
from merging import load_adapter, merge, save_adapter
from server.errors import ConfigError
from server.grammar import parse_expression
from server.shapes import CONFIGS, ModelShape


@dataclass(frozen=True)
class Scale:
    """How large everything is; one row for a GPU, one for a CPU.

    Attributes:
        rank: of every adapter, and of what is merged of them.
        adapters: how many there are.
        hot: how many of them the storm draws from, so that all of them stay on the device.
        terms: adapters in a composition.
        streams: long decodes whose gaps are measured.
        voices: compositions that the streams run on together.
        slots: `--max-loras`.
        loads: merged adapters on disk for vLLM's own loading.
        every: seconds between new compositions in the storm.
        clients: of the closed loops.
        population: compositions in Zipf traffic.
        length: `--max-model-len`.
        prompt: tokens in a prompt.
    """

    rank: int
    adapters: int
    hot: int
    terms: int
    streams: int
    voices: int
    slots: int
    loads: int
    every: float
    clients: int
    population: int
    length: int
    prompt: int

    @property
    def method(self) -> str:
        return f"lego-{self.rank}"


SCALES = {
    "cuda": Scale(
        rank=16, adapters=50, hot=8, terms=4, streams=8, voices=4, slots=16, loads=12, every=0.1, clients=16,
        population=1000, length=4096, prompt=32,
    ),
    "cpu": Scale(
        rank=8, adapters=6, hot=6, terms=4, streams=2, voices=1, slots=4, loads=4, every=2.0, clients=2,
        population=20, length=512, prompt=8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The folders, and the recipes that they were made by.

    Attributes:
        model: the base model.
        dummy: whether the model has a configuration only, its weights to be drawn by vLLM.
        shape: of the model.
        vocabulary: token ids are below it.
        adapters: a folder of PEFT folders, named as in `names`.
        voices: recipes that streams run on; `merged / "v<i>"` is the i-th, merged.
        merged: a folder of PEFT folders: the voices, and `l<i>` to load while streams run.
    """

    model: Path
    dummy: bool
    shape: ModelShape
    vocabulary: int
    adapters: Path
    names: tuple[str, ...]
    voices: tuple[str, ...]
    merged: Path


def build(work: Path, scale: Scale, model: Path | None, shape: str | None, tokenizer: Path | None) -> Stage:
    """Write what is not there yet; a second run with the same sizes finds it. Raises ConfigError."""
    if model is not None:
        dummy = False
    elif shape is not None and tokenizer is not None:
        model, dummy = _dummy_model(work / "model", shape, tokenizer), True
    else:
        raise ConfigError("name a model with --model DIR, or a shape with --shape and --tokenizer DIR")
    sizes = ModelShape.read(model)
    names = tuple(f"a{i:02d}" for i in range(scale.adapters))
    voices = recipes(names[: scale.hot], scale.terms, scale.method, 1, scale.voices)
    loads = recipes(names[: scale.hot], scale.terms, scale.method, 2, scale.loads)
    plan = json.dumps({"scale": asdict(scale), "shape": asdict(sizes), "merged": [*voices, *loads]})
    done = work / "adapters.json"
    if not done.exists() or done.read_text() != plan:
        done.unlink(missing_ok=True)
        for name in ("adapters", "merged"):
            shutil.rmtree(work / name, ignore_errors=True)
        # A process of its own: what it takes of the GPU is gone before servers start.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_write, work, sizes, scale.rank, names, voices, loads).result()
        done.write_text(plan)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return Stage(model, dummy, sizes, vocabulary, work / "adapters", names, tuple(voices), work / "merged")


def _write(work: Path, shape: ModelShape, rank: int, names: Sequence[str], voices: Sequence[str], loads: Sequence[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed, name in enumerate(names):
        save_adapter(random_adapter(shape, rank, seed, device).to("cpu"), work / "adapters" / name)
    targets = [*((f"v{i}", text) for i, text in enumerate(voices)), *((f"l{i}", text) for i, text in enumerate(loads))]
    for name, text in targets:
        spec = parse_expression(text, "cat")
        sources = {term.adapter: load_adapter(work / "adapters" / term.adapter) for term in spec.terms}
        save_adapter(merge(sources, spec, device=device).to("cpu"), work / "merged" / name)


def _dummy_model(folder: Path, shape: str, tokenizer: Path) -> Path:
    """A configuration of that shape beside a tokenizer; the vocabulary is the tokenizer's."""
    ModelShape.named(shape)  # refuses an unknown one
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        words = json.loads((tokenizer / "tokenizer.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{tokenizer} has no tokenizer.json that can be read ({error})") from error
    last = max([*words["model"]["vocab"].values(), *(token["id"] for token in words["added_tokens"])])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    config = CONFIGS[shape] | {"vocab_size": 64 * math.ceil((last + 1) / 64)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
