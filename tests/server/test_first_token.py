"""The time to the first token: of which answers, under which labels, and from when to when."""

import asyncio
import time
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from harness import Harness, settle
from prometheus_client import CollectorRegistry, Histogram
from starlette.types import Message

from server.first_token import timed
from server.gateway import Gateway
from server.service import Service

PATH = "/v1/completions"


def app_of(harness: Harness) -> FastAPI:
    app = FastAPI()
    app.state.loramix = Service(("tiny",), harness.catalog, {}, harness.composer, "cat")
    app.add_middleware(Gateway)

    async def answer(request: Request) -> Response:
        if not (await request.json()).get("stream"):
            return JSONResponse({})
        return StreamingResponse(iter(["data: {}\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream")

    app.post(PATH)(answer)
    return app


async def test_streams_are_counted_once_by_what_they_ask_for_and_where_it_came_from(
    make_harness: Callable[..., Harness],
) -> None:
    harness = make_harness()

    def counted(kind: str, tier: str) -> float:
        return harness.metric("loramix_first_token_seconds_count", kind=kind, tier=tier)

    transport = httpx.ASGITransport(app_of(harness))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for model, times in (("tiny", 2), ("math", 3), ("math*0.5", 1), ("math+code", 3)):
            for _ in range(times):
                await client.post(PATH, json={"model": model, "stream": True})
                await client.post(PATH, json={"model": model})
        await client.post(PATH, json={"model": "nobody", "stream": True})
    # Without streaming they were asked for as well, so each was resident from its second request on.
    assert (counted("base", "none"), counted("adapter", "merged"), counted("adapter", "device")) == (2, 2, 2)
    assert (counted("composition", "merged"), counted("composition", "device")) == (1, 2)


async def test_time_begins_with_the_request_and_includes_the_merge(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(hold=True)
    recipe = harness.recipe("math+code")
    transport = httpx.ASGITransport(app_of(harness))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        asking = asyncio.create_task(client.post(PATH, json={"model": "math+code", "stream": True}))
        await settle()
        await asyncio.sleep(0.05)
        harness.engine.finish(recipe)
        await asking
    assert harness.metric("loramix_first_token_seconds_sum", kind="composition", tier="merged") >= 0.05


def start(status: int, content_type: bytes) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}


def body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


STREAM = b"text/event-stream; charset=utf-8"
CREATED = b'event: response.created\ndata: {"type": "response.created"}\n\n'
IN_PROGRESS = b'event: response.in_progress\ndata: {"type": "response.in_progress"}\n\n'
DELTA = b'event: response.output_text.delta\ndata: {"delta": "x"}\n\n'


@pytest.mark.parametrize(
    ("messages", "counted_after"),
    [
        ([start(200, STREAM), body(b"data: {}\n\n"), body(b"data: [DONE]\n\n")], 1),
        ([start(200, STREAM), body(b""), body(b"data: {}\n\n")], 2),
        ([start(200, STREAM), body(CREATED), body(IN_PROGRESS), body(DELTA)], 3),
        ([start(200, b"application/json"), body(b"{}")], None),
        ([start(404, STREAM), body(b"data: {}\n\n")], None),
        ([start(200, STREAM)], None),
    ],
)
async def test_the_first_token_is_the_first_part_of_a_stream_that_says_something(
    messages: list[Message], counted_after: int | None
) -> None:
    registry = CollectorRegistry()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    timed_send = timed(send, time.perf_counter(), Histogram("first", "First token.", registry=registry))
    for number, message in enumerate(messages):
        await timed_send(message)
        expected = 0 if counted_after is None or number < counted_after else 1
        assert registry.get_sample_value("first_count") == expected
    assert sent == messages
