"""Starting: what is wrong is said in one line before anything is served, and vLLM's own server can carry loramix."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live import ENVIRONMENT, LiveServer, refused, serve_command

from merging import LoraAdapter, load_adapter, save_adapter


def test_an_adapters_folder_that_is_missing_is_named(model: Path, tmp_path: Path) -> None:
    assert f"adapters folder {tmp_path / 'none'} does not exist" in refused("serve", model, "--adapters", tmp_path / "none")


def test_a_broken_adapter_is_refused_by_name_before_the_model_is_loaded(model: Path, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "attn", tmp_path / "good")
    shutil.copytree(adapters / "attn", tmp_path / "short")
    os.truncate(tmp_path / "short" / "adapter_model.safetensors", 1000)
    said = refused("serve", model, "--adapters", tmp_path)
    assert f"adapter {tmp_path / 'short'}: adapter_model.safetensors is truncated" in said
    assert "--skip-bad-adapters" in said


def test_an_option_that_nobody_knows_is_refused_with_the_nearest(model: Path) -> None:
    assert "unknown option --max-lora-rnk; did you mean '--max-lora-rank'" in refused("serve", model, "--max-lora-rnk", "8")
    assert "unknown option --adaptrs; did you mean '--adapters'" in refused("serve", model, "--adaptrs", "x")


def test_what_is_no_model_or_cannot_be_a_cache_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    assert f"model {tmp_path / 'none'} does not exist" in refused("serve", tmp_path / "none")
    assert f"model {tmp_path} is a folder without config.json" in refused("serve", tmp_path)
    assert "--cache-dir /proc/none cannot be written" in refused("serve", model, "--cache-dir", "/proc/none")


def test_a_port_in_use_is_refused_before_the_model_is_loaded(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in refused("serve", model, "--port", str(port))


def test_what_a_worker_fails_with_is_the_last_line(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:100_000])
    done = subprocess.run(
        serve_command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("loramix: cannot start: SafetensorError: ")


def test_an_option_that_loramix_owns_is_refused(model: Path) -> None:
    assert "--lora-modules is set by loramix" in refused("serve", model, "--lora-modules", "a=b")


@pytest.fixture
def misfits(adapters: Path, tmp_path: Path) -> Path:
    """A good adapter, one of another model's shapes, and one that names no module of this model."""
    shutil.copytree(adapters / "attn", tmp_path / "good")
    modules = dict(load_adapter(adapters / "all").modules)
    name = "model.layers.0.self_attn.q_proj"
    unscaled = {key: type(module)(module.a, module.b) for key, module in modules.items()}
    save_adapter(LoraAdapter({name: unscaled["model.layers.0.mlp.down_proj"]}), tmp_path / "other-shape")
    save_adapter(LoraAdapter({f"transformer.{key}": module for key, module in unscaled.items()}), tmp_path / "other-names")
    return tmp_path


def test_adapters_that_do_not_fit_the_model_stop_the_start(model: Path, misfits: Path) -> None:
    said = refused(*serve_command(model, "--adapters", str(misfits))[1:])
    assert f"adapter {misfits / 'other-names'}: none of its 210 modules" in said
    assert "would have no effect" in said


def test_vllms_own_server_carries_loramix_as_a_plugin_and_can_skip_bad_adapters(
    model: Path, misfits: Path, tmp_path: Path
) -> None:
    launcher = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
    command = [
        sys.executable, "-c", launcher, "--model", str(model), "--max-model-len", "512", "--enable-lora",
        "--max-loras", "2", "--max-lora-rank", "16",
        "--worker-extension-cls", "server.vllm_worker.LoramixWorker",
    ]  # fmt: skip
    environment = {
        "VLLM_PLUGINS": "loramix", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "LORAMIX_ADAPTERS": f'["{misfits}"]', "LORAMIX_SKIP_BAD_ADAPTERS": "true",
    }  # fmt: skip
    with LiveServer(command, tmp_path / "log", environment) as server:
        models = [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert models == [str(model), "good"]
        body = {"model": "cat(good*0.5)", "prompt": "Once", "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert answer.headers["x-loramix-cache"] == "merged"
        assert server.stop() == 0
    log = server.log.read_text()
    assert "skipped: adapter" in log
    assert "other-shape" in log
