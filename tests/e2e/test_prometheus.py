"""A real Prometheus, configured as in deploy/, scrapes a real server: every query of the dashboard has data."""

import itertools
import json
import time
from pathlib import Path

import httpx
import pytest
import yaml
from live import LiveServer, serve_command
from prometheus_server import Prometheus
from tools import ROOT, tool

DEPLOY = ROOT / "deploy"
KEY = "a-key-of-the-tests-alone"
PATIENCE = 240  # seconds until all of it has been scraped
NEEDS_A_GPU = {"DCGM_FI_DEV_FB_USED": "the DCGM exporter watches NVIDIA GPUs, and runs beside one"}


def queries() -> list[str]:
    """The dashboard's, as Grafana would send them."""
    panels = json.loads((DEPLOY / "grafana" / "loramix.json").read_text())["panels"]
    exprs = {target["expr"] for panel in panels for target in panel.get("targets", ())}
    assert NEEDS_A_GPU.keys() <= exprs
    return [expr.replace("$instance", ".*").replace("$__rate_interval", "1m") for expr in exprs - NEEDS_A_GPU.keys()]


def config(server: LiveServer, folder: Path) -> dict[str, object]:
    """deploy/prometheus/prometheus.yaml for this server, and each second."""
    (folder / "key").write_text(KEY)
    read = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    read["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    read["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in read["rule_files"]]
    (job,) = read["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    return read


def ask(server: LiveServer, model: str) -> None:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "stream": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-api-key": KEY}, timeout=120)
    assert reply.status_code == 200, reply.text


def traffic(server: LiveServer, number: int) -> None:
    """Every kind of request; over a few rounds there are hits, merges and evictions, reads and writes of the disk."""
    for model in ("smollm2", "mlp", f"svd-8(all*{1 + number / 100}+twin)", f"iso(attn*{1 + number / 100}+mlp)"):
        ask(server, model)
        ask(server, model)
    for back in (2, 3):
        ask(server, f"svd-8(all*{1 + max(0, number - back) / 100}+twin)")
    refused = {"model": "cat(all+twin+mlp)", "prompt": "x"}
    assert httpx.post(f"{server.url}/v1/completions", json=refused, headers={"x-api-key": KEY}).status_code == 400


def firing(prometheus: Prometheus) -> set[str]:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    slow = {"LoramixFirstTokenLate", "LoramixFirstTokenSlowlyLate"}  # which a busy machine may be
    return {rule["name"] for rule in rules if rule["state"] == "firing"} - slow


def spoil(cache: Path) -> None:
    """Damage the entries: folders in the place of their weights."""
    for entry in cache.glob("[0-9a-f]*"):
        weights = entry / "adapter_model.safetensors"
        if weights.is_file():
            weights.unlink()
            weights.mkdir()


def test_every_query_of_the_dashboard_has_data_and_only_what_was_damaged_alarms(
    model: Path, adapters: Path, tmp_path: Path
) -> None:
    tool("prometheus")  # before a server is started for nothing
    cache = tmp_path / "cache"
    # Two pairs of adapters in turn, where memory is for one: so there is always something to read.
    options = [
        "--adapters", str(adapters), "--adapter-host-gib", "0.0105", "--max-loras", "4", "--max-lora-rank", "16",
        "--cache-dir", str(cache), "--enforce-eager",
    ]  # fmt: skip
    with (
        LiveServer(serve_command(model, *options), tmp_path / "log", {"LORAMIX_API_KEY": KEY}) as server,
        Prometheus(tmp_path, config(server, tmp_path)) as prometheus,
    ):
        empty, deadline = queries(), time.monotonic() + PATIENCE
        for number in itertools.count():
            traffic(server, number)
            empty = [expr for expr in empty if not prometheus.has_data(expr)]
            if not empty:
                break
            if all("disk_errors" in expr for expr in empty):
                spoil(cache)
            if time.monotonic() > deadline:
                pytest.fail("no data for:\n" + "\n".join(empty))
        while firing(prometheus) != {"LoramixDiskCorrupt"}:  # and nothing else, of all that was asked
            assert time.monotonic() < deadline + 30, firing(prometheus)
            time.sleep(1)
        (target,) = prometheus.get("targets")["activeTargets"]
        assert (target["health"], target["labels"]["job"]) == ("up", "loramix")
