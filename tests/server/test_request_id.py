"""Request ids: one for each request, the client's if it is fit, in the answer, towards vLLM, and in log lines."""

import asyncio
import logging
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from harness import Harness, settle

from server.gateway import Gateway
from server.request_facts import current
from server.request_id import RequestIds
from server.service import Service

CHAT = "/v1/chat/completions"


@pytest.fixture
def harness(make_harness: Callable[..., Harness]) -> Harness:
    return make_harness()


@pytest.fixture
def client(harness: Harness) -> httpx.AsyncClient:
    """Of a server whose handler tells what id reached it, as header and as the request at hand."""
    app = FastAPI()
    app.state.loramix = Service(("tiny",), harness.catalog, {}, harness.composer, "cat")
    app.add_middleware(Gateway)

    @app.post(CHAT)
    async def echo(request: Request) -> JSONResponse:
        facts = current()
        return JSONResponse({"headers": request.headers.getlist("x-request-id"), "facts": facts and facts.id})

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("unheard of")

    transport = httpx.ASGITransport(RequestIds(app), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def ids(client: httpx.AsyncClient, body: dict[str, object], headers: list[tuple[str, str]]) -> set[str]:
    """Every id that one request had anywhere."""
    raw = [(name.encode(), value.encode()) for name, value in headers]
    answer = await client.post(CHAT, json=body, headers=raw)
    assert answer.status_code == 200
    return {*answer.headers.get_list("x-request-id"), *answer.json()["headers"], answer.json()["facts"]}


@pytest.mark.parametrize("given", ["a", "req-1", "550e8400-e29b-41d4-a716-446655440000", "A.b_c:d-9", "x" * 128])
@pytest.mark.parametrize("model", ["tiny", "math"])
async def test_the_clients_id_is_the_requests(client: httpx.AsyncClient, given: str, model: str) -> None:
    assert await ids(client, {"model": model}, [("X-Request-Id", given)]) == {given}


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "a,b", "{}", "ü", "../x", "a%0Ab"])
async def test_an_id_that_is_not_fit_for_logs_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    (made,) = await ids(client, {"model": "math"}, [("x-request-id", given)])
    assert made != given
    assert len(made) == 32


async def test_a_request_without_an_id_or_with_two_gets_one_of_its_own(client: httpx.AsyncClient) -> None:
    (first,) = await ids(client, {"model": "math"}, [])
    (second,) = await ids(client, {"model": "math"}, [("x-request-id", "a"), ("x-request-id", "b")])
    assert len({first, second, "a", "b"}) == 4


async def test_vllms_field_in_the_body_names_the_request_where_no_header_does(client: httpx.AsyncClient) -> None:
    for model in ("tiny", "math"):
        assert await ids(client, {"model": model, "request_id": "mine"}, []) == {"mine"}
        assert await ids(client, {"model": model, "request_id": "mine"}, [("x-request-id", "header")]) == {"header"}
        (made,) = await ids(client, {"model": model, "request_id": "not fit"}, [])
        assert len(made) == 32


@pytest.mark.parametrize(("method", "path", "status"), [("POST", CHAT, 404), ("GET", "/nowhere", 404), ("GET", "/broken", 500)])
async def test_refusals_and_what_nobody_caught_have_an_id_too(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path, json={"model": "x"}, headers={"x-request-id": "it"})
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == ["it"]


async def test_the_line_of_a_merge_that_fails_is_of_the_request_that_began_it(
    client: httpx.AsyncClient, harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    class Ids(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            facts = current()
            record.request_id = facts and facts.id
            return True

    caplog.handler.addFilter(Ids())
    harness.engine.hold = True
    harness.engine.failures[harness.recipe("math").key] = RuntimeError("unheard of")
    asked = [
        asyncio.create_task(client.post(CHAT, json={"model": "math"}, headers={"x-request-id": name}))
        for name in ("one", "two")
    ]
    await settle()
    harness.engine.finish(harness.recipe("math"))
    assert [(await task).status_code for task in asked] == [500, 500]
    (line,) = [record for record in caplog.records if record.name == "vllm.loramix"]
    assert (line.levelname, line.request_id) == ("WARNING", "one")  # type: ignore[attr-defined]
    assert "could not be merged: unheard of" in line.getMessage()
