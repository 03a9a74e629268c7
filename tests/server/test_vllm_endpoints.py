"""The plugin: what it says of a server that others can reach."""

from argparse import Namespace

import pytest
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

vllm_endpoints = pytest.importorskip("server.vllm_endpoints", reason="needs vLLM")


@pytest.mark.parametrize(
    ("host", "options", "reachable"),
    [
        (None, {}, True),  # vLLM's own default is every interface
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
        (None, {"uds": "/run/loramix.sock"}, False),
        ("0.0.0.0", {"api_key": ["sk-of-vllms-own-kind"]}, False),
    ],
)
def test_a_server_is_warned_of_when_others_reach_it_and_nobody_asks_for_a_key(
    host: str | None, options: dict[str, object], reachable: bool
) -> None:
    assert vllm_endpoints._in_reach(Namespace(**{"host": host, "api_key": None, "uds": None, **options})) == reachable


def test_vllms_key_in_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-of-vllms-own-kind")
    assert not vllm_endpoints._in_reach(Namespace(host=None, api_key=None, uds=None))


@pytest.mark.parametrize(
    ("endpoint", "between"), [(None, []), ("http://localhost:4317", ["Tracing"])], ids=["untraced", "traced"]
)
def test_spans_are_made_only_where_vllm_traces_and_ids_are_around_all(endpoint: str | None, between: list[str]) -> None:
    app = FastAPI()
    app.state.args = Namespace(otlp_traces_endpoint=endpoint)
    vllm_endpoints.LoramixPlugin().attach_router(app)
    app.add_middleware(CORSMiddleware)  # vLLM's own come after the plugin's
    names, layer = [], app.build_middleware_stack()
    while hasattr(layer, "app"):
        names.append(type(layer).__name__)
        layer = layer.app
    assert names[:4] == ["RequestIds", "ServerErrorMiddleware", "CORSMiddleware", "Access"]
    assert names[4 : names.index("Gateway")] == between
