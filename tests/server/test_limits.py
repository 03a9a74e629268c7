"""Limits of the gateway: sizes of bodies and recipes, bodies made to break it, and what a refused client is told."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from harness import Harness, tiny_adapter

from merging import save_adapter
from server.asked import MAX_EXPRESSION
from server.catalog import Catalog
from server.gateway import Gateway
from server.service import Service

CHAT = "/v1/chat/completions"
LIMIT = 10_000


@pytest.fixture
def served(make_harness: Callable[..., Harness]) -> Callable[..., tuple[httpx.AsyncClient, Harness]]:
    """A client of an app that reads LIMIT bytes, and tells the length of what reached vLLM."""

    def make(max_body_bytes: int = LIMIT, **options: Any) -> tuple[httpx.AsyncClient, Harness]:
        harness = make_harness(**options)
        app = FastAPI()
        app.state.loramix = Service(("tiny",), harness.catalog, {}, harness.composer, "cat", max_body_bytes)
        app.add_middleware(Gateway)

        async def length(request: Request) -> JSONResponse:
            return JSONResponse({"length": len(await request.body())})

        app.post(CHAT)(length)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=("1.2.3.4", 5))
        return httpx.AsyncClient(transport=transport, base_url="http://test"), harness

    return make


Served = Callable[..., tuple[httpx.AsyncClient, Harness]]


def body_of_length(length: int, model: str = "math") -> bytes:
    empty = json.dumps({"model": model, "prompt": ""}).encode()
    return empty[:-2] + b"x" * (length - len(empty)) + empty[-2:]


async def test_a_body_is_read_up_to_the_limit(served: Served) -> None:
    client, harness = served()
    assert (await client.post(CHAT, content=body_of_length(LIMIT, "tiny"))).json() == {"length": LIMIT}
    assert (await client.post(CHAT, content=body_of_length(LIMIT))).status_code == 200
    assert harness.metric("loramix_refused_total", reason="body") == 0


@pytest.mark.parametrize("model", ["math", "tiny"])
async def test_a_body_that_is_announced_too_large_is_refused_unread(served: Served, model: str) -> None:
    client, harness = served()
    response = await client.post(CHAT, content=body_of_length(LIMIT + 1, model))
    assert response.status_code == response.json()["error"]["code"] == 413
    assert response.json()["error"]["type"] == "RequestTooLargeError"
    assert "--max-body-mib" in response.json()["error"]["message"]
    assert response.headers["connection"] == "close"  # or the server would read the rest of it
    assert harness.metric("loramix_refused_total", reason="body") == 1


async def test_a_body_in_chunks_is_read_no_further_than_the_limit(served: Served) -> None:
    client, _ = served()
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    assert (await client.post(CHAT, content=endless())).status_code == 413
    assert sent == LIMIT + 1000


async def test_a_body_of_no_data_at_all_or_announced_with_nonsense_breaks_nothing(served: Served) -> None:
    client, _ = served()
    assert (await client.post(CHAT)).json() == {"length": 0}
    for announced in ("9" * 5000, "²", "-1", ""):
        response = await client.post(CHAT, content=b"{}", headers={"content-length": announced.encode("latin-1")})  # type: ignore[dict-item]
        assert response.status_code == (413 if announced.startswith("9") else 200)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize(
    "place", ['{"model": "math", "x": %s}', '{"model": "math", "lora": %s}', '{"lora": {"adapters": %s}}', "%s"]
)
async def test_nesting_of_any_depth_is_no_failure(served: Served, opening: str, place: str) -> None:
    client, harness = served()
    closing = "]" if opening == "[" else "}"
    for depth in [*range(100, 1000, 25), 1500]:
        nested = opening * depth + ("1" if opening != "[" else "") + closing * depth
        response = await client.post(CHAT, content=(place % nested).encode())
        assert response.status_code in (200, 400), response.text
        if depth > 1000:
            assert response.status_code == 400
            assert "nested too deeply" in response.json()["error"]["message"]
    assert harness.metric("loramix_leases") == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "math\xff"}', b"\xff\xfe{", b"\x00", b'{"model": "math", "x": ' + b"1" * 5000 + b"}", b'{"model": "ma',
    ],
)  # fmt: skip
async def test_what_is_no_json_goes_to_vllm(served: Served, body: bytes) -> None:
    client, harness = served()
    assert (await client.post(CHAT, content=body)).json() == {"length": len(body)}
    assert harness.engine.built == []


@pytest.mark.parametrize(
    "body",
    [
        {"model": "math\ud800"},
        {"model": "math\ud800+code"},
        {"lora": {"adapters": [{"name": "\ud800"}]}},
        {"lora": {"adapters": [{"name": "math", "\ud800": 1}]}},
        {"lora": {"adapters": [{"name": "math"}], "options": {"\ud800": "\ud800"}}},
        {"lora": {"adapters": [{"name": "math", "weight": {"\ud800": 0.5}}]}},
        {"lora": {"adapters": [{"name": "math", "weight": float("nan")}]}},
        {"lora": {"adapters": [{"name": "m" * 5000}]}},
        {"lora": {"adapters": [{"name": "math"}] * 200}},
        {"lora": {"adapters": [{"name": "math", "weight": {"*" * length: 0.5 for length in range(2, 131)}}]}},
        {"lora": {"adapters": [{"name": "math", "weight": {str(number): 0.5 for number in range(2049)}}]}},
        {"lora": {"adapters": [{"name": "math"}], "options": {"rank": "x" * 90_000}}},
        {"lora": {"adapters": [{"name": "math"}], "options": {"x" * 90_000: 1}}},
        {"lora": "x" * 90_000},
    ],
)
async def test_bodies_made_to_break_the_answer_are_answered_in_few_words(served: Served, body: dict[str, Any]) -> None:
    client, _ = served(max_body_bytes=2**20)
    response = await client.post(CHAT, content=json.dumps(body))
    assert response.status_code in (400, 404), response.text
    assert len(response.content) < 20_000


async def test_an_expression_of_any_length_is_refused_before_it_is_read(served: Served) -> None:
    client, harness = served()
    longest = "math*0." + "1" * (MAX_EXPRESSION - 7)
    assert (await client.post(CHAT, json={"model": longest})).status_code == 200
    response = await client.post(CHAT, json={"model": longest + "1"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "model is 4097 characters long; use 4096 at most, or a preset"
    assert response.json()["error"]["param"] == "model"
    assert harness.metric("loramix_refused_total", reason="recipe") == 1


async def test_more_adapters_than_the_server_merges_are_refused(catalog: Catalog, tmp_path: Any) -> None:
    few = Catalog(catalog.model.modules, 8, "bfloat16", frozenset({"tiny"}), max_adapters=2)
    for seed, name in enumerate(("a", "b", "c")):
        save_adapter(tiny_adapter(2, seed), tmp_path / name)
        few.add(name, tmp_path / name)
    harness = Harness(few, 2, False, 5.0)
    app = FastAPI()
    app.state.loramix = Service(("tiny",), few, {}, harness.composer, "cat")
    app.add_middleware(Gateway)
    app.post(CHAT)(lambda: {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.post(CHAT, json={"model": "a+b"})).status_code == 200
        response = await client.post(CHAT, json={"model": "a+b+c"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "adapters"
    assert "--max-adapters-per-recipe 3" in response.json()["error"]["message"]
    assert harness.metric("loramix_refused_total", reason="recipe") == 1


async def test_new_merges_over_a_clients_rate_are_answered_with_429_and_when_to_come_again(served: Served) -> None:
    client, harness = served(builds_per_minute=1, clock=lambda: 0.0)
    assert (await client.post(CHAT, json={"model": "math"})).status_code == 200
    response = await client.post(CHAT, json={"model": "code"})
    assert response.status_code == response.json()["error"]["code"] == 429
    assert response.json()["error"]["type"] == "RateLimitError"
    assert response.headers["retry-after"] == "60"
    assert (await client.post(CHAT, json={"model": "math"})).status_code == 200
    assert (await client.post(CHAT, json={"model": "tiny"})).status_code == 200
    assert harness.metric("loramix_refused_total", reason="rate") == 1
    lease = await harness.composer.ensure(harness.recipe("code"), "5.6.7.8")  # each address by itself
    lease.release()
    assert harness.metric("loramix_leases") == 0


async def test_a_wait_that_is_too_long_and_a_line_that_is_full_are_answered_with_503(served: Served) -> None:
    client, harness = served(slots=1, longest_line=1, timeout=0.05)
    lease = await harness.composer.ensure(harness.recipe("math"), "5.6.7.8")
    answers = await asyncio.gather(*(client.post(CHAT, json={"model": model}) for model in ("code", "style")))
    assert [(answer.status_code, answer.headers["retry-after"]) for answer in answers] == [(503, "1")] * 2
    assert "not ready within 0.05 s" in answers[0].json()["error"]["message"]
    assert "1 merges wait for a slot already" in answers[1].json()["error"]["message"]
    assert harness.metric("loramix_refused_total", reason="deadline") == 1
    assert harness.metric("loramix_refused_total", reason="queue") == 1
    lease.release()


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("head", [b"content-length: 1000000000", b"transfer-encoding: chunked"])
async def test_a_server_hangs_up_on_who_goes_on_sending(make_harness: Callable[..., Harness], http: Any, head: bytes) -> None:
    app = FastAPI()
    harness = make_harness()
    app.state.loramix = Service(("tiny",), harness.catalog, {}, harness.composer, "cat", LIMIT)
    app.add_middleware(Gateway)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\n" + head + b"\r\n\r\n")
    piece = b"x" * 1000
    with suppress(ConnectionError):
        for _ in range(100_000):  # 100 MB
            writer.write(piece if b"length" in head else b"3e8\r\n" + piece + b"\r\n")
            await writer.drain()
        pytest.fail("all of it was read")
    with suppress(ConnectionError):
        assert (await reader.read()).startswith(b"HTTP/1.1 413")
    writer.close()
    server.should_exit = True
    await serving
    assert harness.metric("loramix_refused_total", reason="body") == 1
