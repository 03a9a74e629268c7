"""Two workers that hold a part of every layer serve what one would: every method against its offline merge, and dense ΔW.

On a model of its own, since SmolLM2's 9 heads are not to be halved; on two GPUs where there are some, else on the CPU.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live import LiveServer, serve_command
from logprobs import EXACT, ROUNDED, TEXT, base, distance, logprobs_of, served_logprobs, with_dense_deltas, with_offline_merge
from tiny import save_tiny_adapter
from transformers import AutoTokenizer

RECIPES = [
    "cat(one+two*-0.5)", "lego-6(one+two*0.5)", "svd-6(one+two*-0.5)", "linear(one*0.6+three*0.4)", "ties(one+three)",
    "dare(one+three)", "magnitude(one+three*0.5)", "core-ties(one+two)", "tsv(one+two)", "iso(one+two)",
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for seed, (name, rank) in enumerate({"one": 4, "two": 6, "three": 4}.items()):
        save_tiny_adapter(root / name, seed, rank)
    return root


@pytest.fixture(scope="module")
def sharded(tiny: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    options = [
        "--adapters", str(sources), "--max-lora-rank", "16", "--max-loras", "4", "--tensor-parallel-size", "2",
        "--dtype", "bfloat16" if torch.cuda.is_available() else "float32",
    ]  # fmt: skip
    halves = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # one core each: elsewhere vLLM counts on one memory node a worker
    with LiveServer(serve_command(tiny, *options), tmp_path_factory.mktemp("sharded") / "log", halves) as live:
        yield live


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(tiny)(TEXT)["input_ids"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_workers_serve_what_is_merged_offline(
    sharded: LiveServer, tiny: Path, sources: Path, tokens: list[int], recipe: str, tmp_path: Path
) -> None:
    offline = with_offline_merge(tiny, sources, recipe, tmp_path / "merged", dtype=torch.float32)
    near = ROUNDED if torch.cuda.is_available() else EXACT
    served = served_logprobs(sharded, recipe, tokens)
    assert distance(served, logprobs_of(offline, tokens)) < near
    assert distance(served, logprobs_of(base(tiny), tokens)) > 2 * near


def test_two_workers_serve_the_base_plus_the_weighted_sum(
    sharded: LiveServer, tiny: Path, sources: Path, tokens: list[int]
) -> None:
    dense = with_dense_deltas(tiny, sources, {"one": 1.0, "two": -0.5})
    near = ROUNDED if torch.cuda.is_available() else EXACT
    assert distance(served_logprobs(sharded, "cat(one+two*-0.5)", tokens), logprobs_of(dense, tokens)) < near
