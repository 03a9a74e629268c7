"""A real server that logs JSON and exports spans: what it says of requests, and what it never says."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from live import LiveServer, serve_command
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = "sk-of-this-test-0123456789"
PROMPT = "the-words-of-a-client"


class Collector:
    """Takes spans over OTLP, as protobuf over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    @contextmanager
    def listening(self) -> Iterator[str]:
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                spans.extend(span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/v1/traces"
            server.shutdown()

    def of_trace(self, trace: str) -> dict[str, Any]:
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace}


@pytest.fixture(scope="module")
def said(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the server has said of a few requests: lines of its log, spans, answers."""
    folder = tmp_path_factory.mktemp("observed")
    shutil.copytree(adapters, folder / "adapters")
    (folder / "keys.toml").write_text(f'[[key]]\nname = "it"\nkey = "{KEY}"\n')
    (folder / "keys.toml").chmod(0o600)
    collector = Collector()
    with collector.listening() as endpoint:
        options = [
            "--adapters", str(folder / "adapters"), "--max-loras", "3", "--max-lora-rank", "16", "--log-json",
            "--otlp-traces-endpoint", endpoint, "--keys-file", str(folder / "keys.toml"),
        ]  # fmt: skip
        environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with LiveServer(serve_command(model, *options), folder / "log", environment) as server:

            def ask(name: str, request_id: str, key: str = KEY) -> httpx.Response:
                headers = {"x-request-id": request_id, "authorization": f"Bearer {key}"}
                if request_id == "one":
                    headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
                body = {"model": name, "prompt": PROMPT, "max_tokens": 2}
                return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)

            answers = {"merged": ask("cat(all*0.5+mlp)", "one"), "stranger": ask("all", "two", "sk-of-nobody-0123456789")}
            (folder / "adapters" / "twin" / "adapter_model.safetensors").write_bytes(b"")
            answers["broken"] = ask("twin*0.5", "three")
            deadline = time.monotonic() + 20
            while "llm_request" not in collector.of_trace(TRACE) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert server.stop() == 0
    return {"log": server.log.read_text().splitlines(), "spans": collector.of_trace(TRACE), "answers": answers}


def lines_of(said: dict[str, Any], request_id: str, logger: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in said["log"] if line.startswith("{")]
    return [line for line in lines if line.get("request_id") == request_id and line["logger"] == logger]


def test_every_line_but_those_of_native_code_is_json(said: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in said["log"] if line.startswith("{")]
    rest = [line for line in said["log"] if not line.startswith("{") and not native(line)]
    assert rest == []
    assert {line["process"] for line in lines} >= {"APIServer", "EngineCore", "Worker"}
    assert {"uvicorn.access", "uvicorn.error", "vllm.loramix"} <= {line["logger"] for line in lines}
    for line in lines:
        assert {"time", "level", "logger", "process", "pid", "message"} <= line.keys()


def native(line: str) -> bool:
    """Written by C++ past Python, by torch's logger and nanobind's complaint at the end; or blank."""
    return not line or line.startswith(("[W", "nanobind:", " - ", "See https://nanobind"))


def test_the_access_line_says_what_was_asked_for_and_what_came_of_it(said: dict[str, Any]) -> None:
    answer = said["answers"]["merged"]
    assert answer.headers["x-request-id"] == "one"
    assert answer.json()["id"] == "cmpl-one"
    (line,) = lines_of(said, "one", "uvicorn.access")
    assert (line["status"], line["cache"], line["key"]) == (200, "merged", answer.headers["x-loramix-key"])
    assert line["recipe"].startswith("cat(all*0.5+mlp)@")
    assert line["wait_ms"] == pytest.approx(float(answer.headers["x-loramix-merge-ms"]), abs=0.1)


def test_refusals_and_failures_are_told_with_their_requests(said: dict[str, Any]) -> None:
    assert said["answers"]["stranger"].status_code == 401
    assert said["answers"]["stranger"].headers["x-request-id"] == "two"
    assert [line["status"] for line in lines_of(said, "two", "uvicorn.access")] == [401]
    assert said["answers"]["broken"].status_code == 400
    (line,) = lines_of(said, "three", "uvicorn.access")
    assert (line["status"], line["error"]) == (400, "AdapterError")
    (line,) = lines_of(said, "three", "vllm.loramix")
    assert line["level"] == "WARNING"
    assert "could not be merged: adapter" in line["message"]


def test_no_key_and_no_prompt_is_in_the_log_or_the_spans(said: dict[str, Any]) -> None:
    told = "".join(said["log"]) + "".join(map(str, said["spans"].values()))
    for secret in (KEY, "sk-of-nobody", PROMPT):
        assert secret not in told


def test_the_spans_are_one_tree_under_the_clients_with_vllms_own_in_it(said: dict[str, Any]) -> None:
    spans = said["spans"]
    ids = {span.span_id: name for name, span in spans.items()}
    parents = {name: ids.get(span.parent_span_id, span.parent_span_id.hex()) for name, span in spans.items()}
    phases = {f"loramix.merge.{phase}": "loramix.merge" for phase in ("queue", "load", "copy", "merge")}
    assert parents | phases == parents
    assert parents["loramix.request"] == PARENT
    assert parents["llm_request"] == parents["loramix.commit"] == parents["loramix.merge"] == "loramix.request"
