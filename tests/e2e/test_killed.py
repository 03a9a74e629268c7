"""A process of the engine is killed under a real server: whoever waits is told, and the server ends as one that has failed."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, until
from tiny import save_tiny_adapter, tiny_server

MERGED_FOR_SECONDS = f"svd-8({'+'.join(f'a{number}' for number in range(16))})"


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sixteen")
    for seed in range(16):
        save_tiny_adapter(root / f"a{seed}", seed, rank=16, size=0.2)
    return root


def error_of(server: LiveServer, **body: Any) -> dict[str, Any]:
    """What a long completion ends with."""
    body = {"prompt": "Once", "max_tokens": 450, "ignore_eos": True, **body}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
        if reply.headers["content-type"].startswith("text/event-stream"):
            *_, last, done = [line for line in reply.iter_lines() if line]
            assert done == "data: [DONE]"
            return json.loads(last.removeprefix("data: "))["error"]  # type: ignore[no-any-return]
        reply.read()
        assert reply.json()["error"]["code"] == reply.status_code
        return reply.json()["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_who_waits_for_an_engine_that_is_killed_gets_an_error_and_the_server_ends_with_1(
    tiny: Path, sixteen: Path, tmp_path: Path, victim: str
) -> None:
    with tiny_server(tiny, sixteen, tmp_path / "log") as server, ThreadPoolExecutor() as clients:
        running = [
            clients.submit(error_of, server, model=model, stream=stream)
            for model in ("a0", "smollm2")
            for stream in (True, False)
        ]
        until(lambda: server.metric("vllm:num_requests_running") == len(running))
        waiting = [clients.submit(error_of, server, model=MERGED_FOR_SECONDS, stream=stream) for stream in (True, False)]
        until(lambda: server.metric("loramix_waiting_requests") == len(waiting))
        (process,) = [each for each in server.processes() if each.name() == f"VLLM::{victim}"]
        process.send_signal(signal.SIGKILL)
        assert server.ended(60) == 1
        for each in running:
            assert (each.result(60)["type"], each.result()["code"]) == ("InternalServerError", 500)
        for each in waiting:
            assert "the engine has died" in each.result(60)["message"]
            assert each.result()["code"] == 503
    said = server.log.read_text().partition("nanobind: leaked")[0]  # which a library of torch's says as the process ends
    assert said.splitlines()[-1].startswith("loramix: the engine has died, so this server ends")
