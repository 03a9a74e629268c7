"""Spans: a tree for each generation request under the client's trace, with vLLM's own below it, and no word of the prompt."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from harness import Harness, settle
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from server.errors import OutOfMemoryError
from server.gateway import Gateway
from server.request_id import RequestIds
from server.service import Service
from server.tracing import Tracing

CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "x-request-id": "req-1"}


class Traced:
    """A server whose spans are kept, with a handler that tells what reached it."""

    def __init__(self, harness: Harness, **provider: Any) -> None:
        self.exporter = InMemorySpanExporter()
        tracing = TracerProvider(**provider)
        tracing.add_span_processor(SimpleSpanProcessor(self.exporter))
        app = FastAPI()
        app.state.loramix = Service(("tiny",), harness.catalog, {}, harness.composer, "cat")
        app.add_middleware(Gateway)
        app.add_middleware(Tracing, tracer=tracing.get_tracer("test"))

        async def echo(request: Request) -> JSONResponse:
            return JSONResponse({name: request.headers.getlist(name) for name in ("traceparent", "tracestate")})

        app.post(CHAT)(echo)
        app.post("/tokenize")(echo)
        transport = httpx.ASGITransport(RequestIds(app), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def ask(self, model: str, path: str = CHAT, **headers: str) -> httpx.Response:
        return await self.client.post(path, json={"model": model, "messages": "SECRET"}, headers=headers)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def tree(self) -> dict[str, str | None]:
        """Of a single request: the name of each span's parent by its own."""
        finished = self.exporter.get_finished_spans()
        names = {span.context.span_id: span.name for span in finished}
        assert len({span.name for span in finished}) == len(finished)
        return {span.name: names.get(span.parent.span_id) if span.parent else None for span in finished}


@pytest.fixture
def harness(make_harness: Callable[..., Harness]) -> Harness:
    return make_harness(slots=1, timeout=0.2)


@pytest.fixture
def traced(harness: Harness) -> Traced:
    return Traced(harness)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_that_waits_for_its_merge_has_every_span(traced: Traced, harness: Harness) -> None:
    recipe = harness.recipe("math*0.5+code")
    assert (await traced.ask("math*0.5+code", **HEADERS)).status_code == 200
    assert traced.tree() == {
        "loramix.request": None, "loramix.parse": "loramix.request", "loramix.wait": "loramix.request",
        "loramix.commit": "loramix.request", "loramix.merge": "loramix.request",
        "loramix.merge.load": "loramix.merge", "loramix.merge.merge": "loramix.merge",
    }  # fmt: skip
    spans = traced.exporter.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    (root,) = traced.spans("loramix.request")
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    shown = attributes(root)
    assert shown.pop("loramix.wait_ms") > 0
    assert shown == {
        "loramix.request_id": "req-1", "loramix.recipe": recipe.name, "loramix.key": recipe.key, "loramix.method": "cat",
        "loramix.adapters": 2, "loramix.cache": "merged", "http.response.status_code": 200, "url.path": CHAT,
    }  # fmt: skip
    assert "SECRET" not in "".join(span.to_json() for span in spans)


async def test_phases_follow_each_other_and_end_with_the_build(traced: Traced) -> None:
    await traced.ask("math")
    (root,), (wait,), (commit,), (merge,), (load,), (last,) = (
        traced.spans(f"loramix.{name}") for name in ("request", "wait", "commit", "merge", "merge.load", "merge.merge")
    )
    assert commit.end_time - commit.start_time == 1_000_000  # the fake engine's
    assert commit.end_time == merge.start_time == load.start_time
    assert load.end_time == last.start_time
    assert last.end_time == merge.end_time <= root.end_time
    assert root.start_time <= wait.start_time <= wait.end_time <= merge.end_time


async def test_vllm_finds_our_span_as_its_parent_and_the_clients_state(traced: Traced) -> None:
    reached = (await traced.ask("math", **HEADERS)).json()
    (root,) = traced.spans("loramix.request")
    assert reached["traceparent"] == [f"00-{TRACE}-{root.context.span_id:016x}-01"]
    assert reached["tracestate"] == ["vendor=1"]


@pytest.mark.parametrize("header", [None, "nonsense", "00-" + "0" * 32 + f"-{PARENT}-01"])
async def test_without_a_trace_of_the_clients_a_new_one_begins(traced: Traced, header: str | None) -> None:
    reached = (await traced.ask("tiny", **({} if header is None else {"traceparent": header}))).json()
    (root,) = traced.spans("loramix.request")
    assert root.parent is None
    (parent,) = reached["traceparent"]
    assert parent.startswith(f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-")
    assert traced.tree() == {"loramix.request": None, "loramix.parse": "loramix.request"}  # the base model waits for nothing


async def test_what_is_resident_is_not_waited_for(traced: Traced) -> None:
    await traced.ask("math")
    traced.exporter.clear()
    await traced.ask("math")
    assert traced.tree() == {"loramix.request": None, "loramix.parse": "loramix.request"}
    assert attributes(traced.spans("loramix.request")[0])["loramix.cache"] == "device"


async def test_a_request_that_joins_a_build_says_so(traced: Traced, harness: Harness) -> None:
    harness.engine.hold = True
    asked = []
    for _ in range(2):
        asked.append(asyncio.create_task(traced.ask("math")))
        await settle()
    harness.engine.finish(harness.recipe("math"))
    await asyncio.gather(*asked)
    merges = traced.spans("loramix.merge")
    assert sorted(attributes(span).get("loramix.joined", False) for span in merges) == [False, True]
    (joined,) = [span for span in merges if attributes(span)]
    assert joined.parent is not None
    (root,) = [span for span in traced.spans("loramix.request") if span.context.span_id == joined.parent.span_id]
    assert root.start_time <= joined.start_time
    assert len(traced.spans("loramix.commit")) == 1


async def test_waiting_for_a_slot_is_seen(traced: Traced, harness: Harness) -> None:
    lease = await harness.composer.ensure(harness.recipe("code"), "other")
    asked = asyncio.create_task(traced.ask("math"))
    await asyncio.sleep(0.05)
    lease.release()
    assert (await asked).status_code == 200
    (wait,) = traced.spans("loramix.wait")
    assert wait.end_time - wait.start_time > 20_000_000


@pytest.mark.parametrize(
    ("model", "status", "kind", "names"),
    [
        ("nope", 404, "UnknownModelError", {"loramix.parse"}),
        ("code", 503, "OutOfMemoryError", {"loramix.parse", "loramix.wait"}),
        ("style", 503, "BusyError", {"loramix.parse", "loramix.wait"}),
    ],
)
async def test_refusals_are_errors_and_say_of_what_kind(
    traced: Traced, harness: Harness, model: str, status: int, kind: str, names: set[str]
) -> None:
    if model == "style":
        await harness.composer.ensure(harness.recipe("math"), "other")
    harness.engine.failures[harness.recipe("code").key] = OutOfMemoryError("no memory")
    assert (await traced.ask(model)).status_code == status
    (root,) = traced.spans("loramix.request")
    assert root.status.status_code == StatusCode.ERROR
    assert attributes(root)["error.type"] == kind
    assert attributes(root)["http.response.status_code"] == status
    assert traced.tree().keys() == {"loramix.request"} | names
    (failed,) = [
        span for span in traced.exporter.get_finished_spans() if span.status.status_code == StatusCode.ERROR and span != root
    ]
    assert failed.name == ("loramix.parse" if status == 404 else "loramix.wait")


async def test_a_handler_that_fails_ends_its_span(traced: Traced, harness: Harness) -> None:
    harness.engine.failures[harness.recipe("math").key] = RuntimeError("unheard of")
    assert (await traced.ask("math")).status_code == 500
    (root,) = traced.spans("loramix.request")
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "RuntimeError")


async def test_routes_that_generate_nothing_have_no_spans(traced: Traced) -> None:
    reached = (await traced.ask("math", "/tokenize", **HEADERS)).json()
    assert reached["traceparent"] == [HEADERS["traceparent"]]
    assert traced.exporter.get_finished_spans() == ()


async def test_a_trace_that_is_not_sampled_goes_on_unsampled(harness: Harness) -> None:
    traced = Traced(harness, sampler=ALWAYS_OFF)
    reached = (await traced.ask("math", **HEADERS)).json()
    assert reached["traceparent"][0].startswith(f"00-{TRACE}-")
    assert reached["traceparent"][0].endswith("-00")
    assert traced.exporter.get_finished_spans() == ()


def test_without_tracing_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, server.gateway, server.request_id, server.service, server.composer; print('opentelemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
