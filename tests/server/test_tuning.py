"""Tuning LoRA kernels, where no GPU is needed: launches of a model, the search, and the files as vLLM reads them."""

import json
import math
import time
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.shapes import ModelShape
from server.tuning import SPACE, Config, Launch, Tuned, launches, search, tune, write

LLAMA = ModelShape.named("llama-8b")
GPU = "NVIDIA H100 80GB HBM3"


def default(launch: Launch) -> Config:
    return {"block_m": 32, "block_n": 16, "block_k": 256, "split_k": 64, "num_warps": 4, "num_stages": 2, "max_nreg": None}


def slope(config: Config) -> float:
    """Microseconds that fall towards one configuration, each setting for itself."""
    target = {"split_k": 8, "block_k": 512, "num_warps": 2, "block_m": 16, "block_n": 16, "num_stages": 3}
    return 10 + sum(abs(math.log2((config[name] or 1) / value)) for name, value in target.items())


def test_an_8b_llama_has_seven_launches_a_batch_size() -> None:
    places = {(launch.kernel, *launch.place) for launch in launches(LLAMA, 16, [8])}
    assert places == {
        ("shrink", 3, 8, 4096, 16), ("shrink", 1, 8, 4096, 16), ("shrink", 2, 8, 4096, 16), ("shrink", 1, 8, 14336, 16),
        ("expand", 3, 8, 16, 4096), ("expand", 2, 8, 16, 14336), ("expand", 1, 8, 16, 4096),
    }  # fmt: skip
    assert [launch.tokens for launch in launches(LLAMA, 16, [8, 1])] == [8] * 7 + [1] * 7


def test_shards_split_outputs_of_the_first_layers_and_inputs_of_the_second() -> None:
    places = {(launch.kernel, *launch.place) for launch in launches(LLAMA, 16, [1], shards=2)}
    assert ("shrink", 1, 1, 7168, 16) in places
    assert ("expand", 2, 1, 16, 7168) in places
    assert ("shrink", 3, 1, 4096, 16) in places


def test_the_search_finds_the_best_where_each_setting_counts_for_itself() -> None:
    found = search([default(launches(LLAMA, 16, [8])[0])], SPACE["shrink"], slope, time.monotonic() + 60)
    assert slope(found) == 10
    assert found["max_nreg"] is None


def test_a_configuration_that_cannot_be_used_is_never_taken() -> None:
    def limited(config: Config) -> float:
        return math.inf if (config["block_k"] or 0) > 256 else slope(config)

    found = search([default(launches(LLAMA, 16, [8])[0])], SPACE["shrink"], limited, time.monotonic() + 60)
    assert found["block_k"] == 256
    assert slope(found) == 11


def test_without_time_the_best_start_is_the_answer() -> None:
    starts = [default(launches(LLAMA, 16, [8])[0]), {**default(launches(LLAMA, 16, [8])[0]), "split_k": 8}]
    assert search(starts, SPACE["shrink"], slope, time.monotonic() - 1) == starts[1]


def test_what_is_not_faster_when_measured_again_is_not_taken() -> None:
    launch = launches(LLAMA, 16, [8])[0]
    times = iter([10.0, 5.0])  # vLLM's own, a lucky one, and from then on all are alike

    def lucky(_: Launch) -> object:
        return lambda config: next(times, 10.0)

    (tuned,) = tune([launch], default, lucky, 60)  # type: ignore[arg-type]
    assert tuned.config == default(launch)
    assert tuned.microseconds == tuned.default_microseconds == 10


def test_a_search_starts_from_what_the_batch_size_before_ended_with() -> None:
    todo = [launch for launch in launches(LLAMA, 16, [8, 4]) if launch.place[::2] == (3, 4096) and launch.kernel == "shrink"]
    asked: dict[int, list[Config]] = {8: [], 4: []}

    def timer(launch: Launch) -> object:
        return lambda config: asked[launch.tokens].append(config) or slope(config)

    first, second = tune(todo, default, timer, 60)  # type: ignore[arg-type]
    assert slope(first.config) == 10
    assert asked[4][1] == first.config == second.config


def tuned_for(rank: int, split_k: int) -> list[Tuned]:
    return [Tuned(launch, {**default(launch), "split_k": split_k}, 5.0, 9.0) for launch in launches(LLAMA, rank, [1, 8])]


def test_vllm_finds_each_launch_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("vllm.lora.ops.triton_ops.utils", reason="needs vLLM")
    results = [
        Tuned(launch, {**default(launch), "block_m": 1000 + i}, 5.0, 9.0)
        for i, launch in enumerate(launches(LLAMA, 16, [1, 8]))
    ]
    write(results, default, 8, GPU, tmp_path)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: GPU)
    for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
        cached.cache_clear()
    try:
        for tuned in results:
            slices, tokens, k, n = tuned.launch.place
            add = None if tuned.launch.kernel == "shrink" else True
            size, rank = (k, n) if tuned.launch.kernel == "shrink" else (n, k)
            assert utils.get_lora_op_configs(tuned.launch.kernel, 9, tokens, size, rank, slices, add) == tuned.config
        other = utils.get_lora_op_configs("shrink", 5, 8, 2048, 32, 6, None)  # a layer that the model has not
        assert other == default(results[0].launch)
    finally:
        for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
            cached.cache_clear()


def test_a_second_run_adds_to_the_files(tmp_path: Path) -> None:
    shrink, _ = write(tuned_for(16, 8), default, 8, GPU, tmp_path)
    write(tuned_for(32, 4), default, 8, GPU, tmp_path)
    write(tuned_for(16, 2), default, 16, GPU, tmp_path)
    table = json.loads(shrink.read_text())
    assert shrink.name == "NVIDIA_H100_80GB_HBM3_SHRINK.json"
    assert set(table) == {"9", "17"}
    assert {n: config["split_k"] for n, config in table["9"]["3"]["8"]["4096"].items()} == {"16": 8, "32": 4}
    assert table["17"]["3"]["1"]["4096"]["16"]["split_k"] == 2


def test_a_file_that_is_no_json_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "NVIDIA_H100_80GB_HBM3_SHRINK.json").write_text("{")
    with pytest.raises(ConfigError, match=r"SHRINK.json is no JSON"):
        write(tuned_for(16, 8), default, 8, GPU, tmp_path)
    assert (tmp_path / "NVIDIA_H100_80GB_HBM3_SHRINK.json").read_text() == "{"


def test_a_model_that_is_not_laid_out_like_llama_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_embd": 768, "num_attention_heads": 12}')
    with pytest.raises(ConfigError, match="hidden_size"):
        ModelShape.read(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'llama-8b'"):
        ModelShape.named("llama8b")
