"""Starting vLLM: what it is left with of a GPU's memory beside the adapter store."""

import logging
from argparse import Namespace
from types import SimpleNamespace

import pytest

from server.errors import ConfigError

vllm_launch = pytest.importorskip("server.vllm_launch", reason="needs vLLM")
GIB = 2**30


def left_on(monkeypatch: pytest.MonkeyPatch, share: float, adapter_gib: float, *, gpu_gib: int | None = 80) -> float:
    """vLLM's share of a GPU's memory beside a store of that size; None GiB stand for a CPU."""
    platform = SimpleNamespace(is_cuda=lambda: gpu_gib is not None, get_device_total_memory=lambda: (gpu_gib or 0) * GIB)
    monkeypatch.setattr(vllm_launch, "current_platform", platform)
    args = Namespace(gpu_memory_utilization=share)
    vllm_launch._leave_memory(args, int(adapter_gib * GIB))
    return float(args.gpu_memory_utilization)


def test_vllm_sizes_its_cache_beside_the_adapter_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_on(monkeypatch, 0.9, 4) == pytest.approx(0.85)
    assert left_on(monkeypatch, 0.5, 8) == pytest.approx(0.4)


def test_a_cpu_has_no_memory_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_on(monkeypatch, 0.9, 4, gpu_gib=None) == 0.9


def test_a_store_that_leaves_vllm_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--adapter-gpu-gib 72 .* --gpu-memory-utilization 0\.9"):
        left_on(monkeypatch, 0.9, 72)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM's options import
def test_the_server_listens_on_loopback_unless_told_otherwise() -> None:
    assert vllm_launch._parse("model", {}, [], []).host == "127.0.0.1"
    assert vllm_launch._parse("model", {}, ["--host", "0.0.0.0"], []).host == "0.0.0.0"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [["--api-key", "sk-of-vllms-own-kind"], ["--api-key=sk-of-vllms-own-kind"]])
def test_a_key_of_vllms_beside_ours_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("LORAMIX_API_KEY", "sk-of-loramix-kind")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(ConfigError, match="--api-key is vLLM's own and does not go with LORAMIX_API_KEY"):
        vllm_launch.serve("model", {}, options, [], 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_value_of_a_mistyped_option_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="unknown option --api-kye; did you mean '--api-key'") as refused:
        vllm_launch._parse("model", {}, ["--api-kye=sk-of-vllms-own-kind"], [])
    assert "sk-" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_value_that_vllm_cannot_read_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"^argument --max-loras: invalid int value: 'abc'$"):
        vllm_launch._parse("model", {}, ["--max-loras", "abc"], [])
    assert capsys.readouterr().err == ""


def test_vllms_options_for_logs_count_beside_json(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    access = logging.getLogger("uvicorn.access")
    monkeypatch.setattr(vllm_launch, "to_json", levels.append)
    monkeypatch.setattr(access, "filters", [])
    args = Namespace(log_level="DEBUG", disable_access_log_for_endpoints="/health, /metrics")
    assert vllm_launch._log_json(args) == {"log_config": None}
    assert levels == ["DEBUG"]
    lines = {
        path: access.makeRecord(
            access.name, logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', ("a", "GET", path, "1.1", 200), None
        )
        for path in ("/health", "/metrics?x=1", "/v1/models")
    }
    assert [path for path, line in lines.items() if access.filter(line)] == ["/v1/models"]


def test_a_checkout_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM finds its plugins among installed packages, and would serve without loramix."""
    monkeypatch.setattr(vllm_launch, "entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match="not installed"):
        vllm_launch.serve("model", {}, [], [], 0)
