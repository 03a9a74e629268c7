"""Costs say again what the files of results say."""

import json
from pathlib import Path

import pytest

import benchmarks.fleet
from benchmarks.fleet.costs import adapter_bytes, read_costs
from benchmarks.serving.stage import SCALES

RESULTS = Path(benchmarks.fleet.__file__).parents[1] / "results"
MEASURED = json.loads((RESULTS / "serve-h100.json").read_text())["figures"]
COSTS = read_costs(RESULTS, 0.15)


def test_a_build_takes_what_was_measured_whether_sources_are_on_the_device_or_in_host_memory() -> None:
    waits = (MEASURED["storm_queue_ms_mean"] + MEASURED["storm_load_ms_mean"]) / 1e3
    assert COSTS.way_seconds + COSTS.merge_seconds + waits == pytest.approx(MEASURED["ready_ms_p50_device"] / 1e3)
    from_host = COSTS.merge_seconds + 4 * MEASURED["storm_host_sources_host_share"] * COSTS.host_seconds
    measured = MEASURED["storm_host_copy_ms_mean"] + MEASURED["storm_host_merge_ms_mean"]
    assert from_host == pytest.approx(measured / 1e3)


def test_warm_requests_take_what_the_measured_throughput_says() -> None:
    assert 64 * COSTS.capacity(64) == pytest.approx(MEASURED["tokens_per_s_warm"])
    assert COSTS.seats == SCALES["cuda"].clients
    assert COSTS.request_seconds(1) == pytest.approx(MEASURED["ttft_ms_p50_warm"] / 1e3)


def test_an_adapter_of_rank_16_for_an_8b_model_is_80_mib() -> None:
    assert COSTS.nbytes == adapter_bytes("llama-8b", 16) == 80 << 20


def test_reading_is_what_was_given() -> None:
    assert COSTS.read_seconds == 0.15
