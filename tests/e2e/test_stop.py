"""SIGTERM: a real server finishes its streams, takes nothing new, and ends well."""

import signal
import threading
import time
from pathlib import Path

import httpx
from live import LiveServer, serve_command

BODY = {"prompt": "Once upon a time", "ignore_eos": True}


def test_sigterm_drains_and_then_stops(model: Path, adapters: Path, tmp_path: Path) -> None:
    options = ["--adapters", str(adapters), "--max-lora-rank", "16", "--max-loras", "3"]
    chunks: list[str] = []

    def stream() -> None:
        body = {**BODY, "model": "cat(mlp*0.3)", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as reply:
            chunks.extend(line for line in reply.iter_lines() if line.startswith("data:"))

    with LiveServer(serve_command(model, *options), tmp_path / "log") as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        streaming = threading.Thread(target=stream)
        streaming.start()
        while server.metric("loramix_leases") == 0 or server.metric("loramix_waiting_requests") > 0:
            time.sleep(0.05)
        server.signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/ready").status_code == 200:
            time.sleep(0.05)
        for name in ("smollm2", "mlp"):
            reply = httpx.post(f"{server.url}/v1/completions", json={**BODY, "model": name, "max_tokens": 1}, timeout=30)
            assert reply.status_code == 503, reply.text
        streaming.join()
        assert chunks[-1] == "data: [DONE]"
        assert len(chunks) > 60
        assert server.stop() == 0
