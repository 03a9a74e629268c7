"""The benchmark of serving, where no server is needed: traffic, statistics, the order of servers, the record."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.adapters import random_adapter
from benchmarks.machine import device_name
from benchmarks.serving import plots, record
from benchmarks.serving.parts import TRIALS, Trial, waves
from benchmarks.serving.servers import SETUPS, Machine
from benchmarks.serving.stage import SCALES, Stage, build
from benchmarks.serving.trace import Answer, Trace, curve, quantile, spread, timeline
from benchmarks.serving.traffic import Prompts, recipes, zipf
from merging import load_adapter, save_adapter
from server.errors import ConfigError
from server.grammar import parse_expression
from server.shapes import ModelShape

CPU = torch.device("cpu")
NAMES = [f"a{i}" for i in range(10)]


def answer(sent: float, ticks: list[float], tokens: list[int] | None = None, **other: object) -> Answer:
    return Answer(**{"label": "x", "sent": sent, "status": 200, "ticks": ticks, "tokens": tokens or [1] * len(ticks), **other})


# Traffic


def test_recipes_are_never_the_same_twice_and_the_same_in_every_run() -> None:
    drawn = recipes(NAMES, 4, "lego-16", 1, 500)
    specs = [parse_expression(text, "cat") for text in drawn]
    assert len(set(specs)) == 500
    assert all(len({term.adapter for term in spec.terms}) == 4 and spec.method.name == "lego" for spec in specs)
    assert drawn == recipes(NAMES, 4, "lego-16", 1, 500)
    assert drawn != recipes(NAMES, 4, "lego-16", 2, 500)


def test_recipes_in_turn_come_back_to_an_adapter_only_when_all_others_had_theirs() -> None:
    terms = [[t.adapter for t in parse_expression(text, "cat").terms] for text in recipes(NAMES, 4, "cat", 1, 25, in_turn=True)]
    assert Counter(itertools.chain(*terms)) == dict.fromkeys(NAMES, 10)
    assert sorted(itertools.chain(*terms[:2])) == NAMES[:8]


def test_zipf_traffic_follows_its_power_law() -> None:
    counts = Counter(itertools.islice(zipf(NAMES, 1.1, 3), 100_000))
    total = sum(k**-1.1 for k in range(1, 11))
    for k, name in enumerate(NAMES, 1):
        share = k**-1.1 / total
        assert counts[name] / 100_000 == pytest.approx(share, abs=5 * math.sqrt(share / 100_000))


def test_streams_deal_the_models_out_and_no_two_share_a_prompt() -> None:
    scripts = Prompts(49152, 32, 0).streams(["u", "v"], 5, 100)
    bodies = [script.requests[0].body for script in scripts]
    assert [body["model"] for body in bodies] == ["u", "v", "u", "v", "u"]
    assert all(script.repeat for script in scripts)
    assert all(body["max_tokens"] == 100 and body["ignore_eos"] and len(body["prompt"]) == 32 for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 5
    assert max(max(body["prompt"]) for body in bodies) < 49152


# Statistics


def test_a_quantile_is_a_value_that_was_seen() -> None:
    draw = random.Random(0)
    for size in (1, 2, 7, 100, 1001):
        values = [draw.random() for _ in range(size)]
        for share in (0.01, 0.5, 0.9, 0.99, 1.0):
            assert quantile(values, share) == np.quantile(values, share, method="inverted_cdf")


def test_a_spread_of_nothing_is_no_figure() -> None:
    assert spread("gap_ms", [], "quiet", worst=True) == {}
    assert spread("gap_ms", [1.0, 2.0, 9.0], "quiet", worst=True) == {
        "gap_ms_p50_quiet": 2.0, "gap_ms_p99_quiet": 9.0, "gap_ms_max_quiet": 9.0,
    }  # fmt: skip
    assert set(spread("ttft_ms", [1.0], "cold")) == {"ttft_ms_p50_cold", "ttft_ms_p99_cold"}


def test_gaps_are_within_an_answer_and_within_the_window() -> None:
    trace = Trace([answer(0, [1.0, 1.5, 3.0]), answer(0, [1.2, 1.25, 2.0, 9.0])])
    assert trace.gaps(1.1, 3.0) == [(1.25, pytest.approx(50)), (2.0, pytest.approx(750)), (3.0, pytest.approx(1500))]
    assert len(trace.gaps(0, 10)) == 5


def test_a_token_rate_counts_tokens_not_chunks() -> None:
    trace = Trace([answer(0, [0.5, 1.0, 1.9, 2.0], [1, 3, 2, 7]), answer(0, [1.5])])
    assert trace.token_rate(1.0, 2.0) == 6
    assert trace.token_rate(0.0, 4.0) == 14 / 4


def test_only_requests_that_were_merged_count_for_readiness() -> None:
    trace = Trace([
        answer(0, [1], cache="merged", merge_ms=12.0), answer(0, [1], cache="device", merge_ms=0.0),
        answer(0, [], cache="merged", merge_ms=99.0, status=503, said="busy"), answer(0, [1]),
    ])  # fmt: skip
    assert trace.merged() == [12.0]
    assert [a.said for a in trace.failed()] == ["busy"]


def test_an_answer_that_was_cut_off_is_no_failure_and_has_no_first_token() -> None:
    trace = Trace([Answer("x", 0.0), answer(1.0, [1.25], label="x"), answer(1.0, [4.0], label="y")])
    assert trace.failed() == []
    assert trace.first_tokens("x") == [250.0]


def test_the_clients_own_lateness_is_that_of_the_window() -> None:
    trace = Trace(late=[(0.5, 0.3), (1.5, 0.002), (1.8, 0.001), (5.0, 0.9)])
    assert trace.latest_ms(1, 2) == pytest.approx(2)
    assert trace.latest_ms(2, 3) == 0


def test_a_curve_holds_the_maximum_and_the_share_above_each_value() -> None:
    values = list(range(1, 1001))
    points = curve(values)
    assert points[0] == (0.001, 1000)
    assert points[-1] == (1.0, 1)
    assert all(share == sum(v >= value for v in values) / 1000 for share, value in points)
    assert curve([]) == []


def test_a_timeline_keeps_the_longest_gap_of_each_step() -> None:
    assert timeline([(10.01, 5.0), (10.05, 7.0), (10.32, 6.0)], 10.0) == [7.0, 0.0, 0.0, 6.0]


# Servers


def test_waves_keep_the_order_and_never_start_more_than_fit() -> None:
    trials = [Trial("p", servers, print) for servers in (("a",), ("a", "b"), ("c",), ("b",), ("d",), ("e", "f"))]
    own = {name: name for name in "abcdef"}
    groups = waves(trials, 3, own)
    assert list(itertools.chain(*groups)) == trials
    assert [len({name for trial in group for name in trial.servers}) for group in groups] == [3, 3]
    assert len(waves(trials, 6, own)) == 1
    assert [len(group) for group in waves(trials, 1, own)] == [1] * 6
    assert len(waves(trials, 3, own | {"e": "a", "f": "b", "d": "c"})) == 1, "servers that are alike count once"


def test_every_trial_names_servers_of_the_table_and_every_server_is_measured() -> None:
    assert {name for trial in TRIALS for name in trial.servers} == set(SETUPS)


def test_both_sides_of_a_comparison_have_the_same_settings(tmp_path: Path) -> None:
    shape = ModelShape.named("llama-8b")
    stage = Stage(tmp_path, True, shape, 1000, tmp_path / "a", ("a00",), ("cat(a00)",), tmp_path / "m")
    machine, scale = Machine("cuda", tmp_path / "tuned"), SCALES["cuda"]
    options = []
    for name in ("loramix", "vllm"):
        words = machine.command(SETUPS[name], stage, scale)
        flags = (
            "--max-loras",
            "--max-lora-rank",
            "--max-model-len",
            "--max-num-seqs",
            "--load-format",
            "--kv-cache-memory-bytes",
        )
        options.append({flag: words[words.index(flag) + 1] for flag in flags})
    assert options[0] == options[1]
    one, other = (machine.environment(SETUPS[name]) for name in ("loramix", "vllm"))
    assert one == other
    assert one["VLLM_TUNED_CONFIG_FOLDER"] == str(tmp_path / "tuned")
    assert "VLLM_TUNED_CONFIG_FOLDER" not in machine.environment(SETUPS["lora"])


# What lies on disk


def test_a_shape_becomes_a_model_folder_with_the_tokenizers_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    words = {"model": {"vocab": {"a": 0, "b": 99}}, "added_tokens": [{"id": 128}]}
    (tokenizer / "tokenizer.json").write_text(json.dumps(words))
    monkeypatch.setattr("benchmarks.serving.stage._write", print)  # 50 adapters of 84 MB
    monkeypatch.setattr("benchmarks.serving.stage.ProcessPoolExecutor", InThisProcess)
    stage = build(tmp_path / "work", SCALES["cuda"], None, "llama-8b", tokenizer)
    assert stage.dummy
    assert stage.vocabulary == 192  # the next multiple of 64 over 128
    assert ModelShape.read(stage.model) == ModelShape(layers=32, hidden=4096, query=4096, kv=1024, mlp=14336)
    assert (stage.model / "tokenizer.json").exists()
    assert len(stage.names) == 50
    assert len(stage.voices) == 4


class InThisProcess:
    def __init__(self, *_: object) -> None: ...
    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None: ...
    def submit(self, *_: object) -> "InThisProcess":
        return self

    def result(self) -> None: ...


@pytest.mark.parametrize("given", [(None, None), ("llama-8b", None), ("lama-8b", Path("."))])
def test_a_model_or_a_shape_with_a_tokenizer_has_to_be_named(tmp_path: Path, given: tuple[str | None, Path | None]) -> None:
    with pytest.raises(ConfigError, match=r"--shape and --tokenizer DIR|did you mean 'llama-8b'"):
        build(tmp_path, SCALES["cpu"], None, *given)


def test_random_adapters_are_peft_folders_on_every_linear_layer(tmp_path: Path) -> None:
    shape = ModelShape(layers=2, hidden=32, query=48, kv=16, mlp=64)
    save_adapter(random_adapter(shape, 4, 0, CPU), tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert len(adapter.modules) == 14
    assert adapter.modules["model.layers.1.self_attn.o_proj"].shape == (32, 48)
    assert adapter.modules["model.layers.0.mlp.down_proj"].shape == (32, 64)
    assert adapter.digest != random_adapter(shape, 4, 1, CPU).digest


# The record


def test_parts_of_several_runs_stand_side_by_side_each_with_its_command(tmp_path: Path) -> None:
    first = record.merge(
        None, "NVIDIA H100 80GB HBM3", "one", "storm", {"gap": 1.23456, "late": 2.0}, {"gap_tail": {"quiet": [[1, 2]]}}
    )
    both = record.merge(first, "NVIDIA H100 80GB HBM3", "two", "ttft", {"ttft": 3.0}, {"ttft": {"cold": [1.0]}})
    assert both["figures"] == {"gap": 1.2346, "late": 2.0, "ttft": 3.0}
    assert [both["runs"][part]["command"] for part in ("storm", "ttft")] == ["one", "two"]
    again = record.merge(both, "NVIDIA H100 80GB HBM3", "three", "storm", {"gap": 5.0}, {})
    assert again["figures"] == {"gap": 5.0, "ttft": 3.0}
    assert again["runs"]["storm"]["command"] == "three"
    record.save(again, tmp_path / "r" / "serve-h100.json")
    assert json.loads((tmp_path / "r" / "serve-h100.json").read_text()) == again


def test_figures_of_other_hardware_are_not_kept() -> None:
    first = record.merge(None, "NVIDIA H100 80GB HBM3", "one", "storm", {"gap": 1.0}, {})
    assert record.merge(first, "NVIDIA H200", "two", "ttft", {"ttft": 3.0}, {})["figures"] == {"ttft": 3.0}
    assert device_name("NVIDIA H100 80GB HBM3", "cuda") == "h100"


def test_plots_are_drawn_of_what_there_is_and_of_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {"token_ms_base": 6.5, "token_ms_lora": 9.1, "tokens_per_s_rank16_lego": 880.0}
    course = {"gap_course": {"quiet": [9.0, 0.0, 9.5]}, "gap_tail": {"quiet": [[0.5, 9.5], [1.0, 9.0]]}}
    drawn = plots.draw({"hardware": "x", "figures": figures, "series": course}, tmp_path / "serve-x")
    assert [path.name for path in drawn] == ["serve-x-gaps.png", "serve-x-settings.png"]
    assert plots.draw({"hardware": "x", "figures": {}, "series": {}}, tmp_path / "none") == []
