"""The gateway: what it changes of a request and a response, and that a lease lives exactly as long as the response."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from harness import Harness

from server.errors import OutOfMemoryError
from server.gateway import Gateway
from server.grammar import parse_expression
from server.service import Service

MakeApp = Callable[..., tuple[FastAPI, Harness]]


@pytest.fixture
def make_app(make_harness: Callable[..., Harness]) -> MakeApp:
    """An app whose handlers stand for vLLM's: they tell what reached them."""

    def make(**options: Any) -> tuple[FastAPI, Harness]:
        harness = make_harness(**options)
        app = FastAPI()
        presets = {"tutor": parse_expression("lego-4(math+code)", "cat")}
        app.state.loramix = Service(("tiny",), harness.catalog, presets, harness.composer, "cat")
        app.add_middleware(Gateway)

        async def echo(request: Request) -> JSONResponse:
            raw = await request.body()
            return JSONResponse({"raw": raw.decode(errors="replace"), "leases": harness.metric("loramix_leases")})

        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/embeddings"):
            app.post(path)(echo)
        return app, harness

    return make


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def reached(
    app: FastAPI, body: dict[str, Any], path: str = "/v1/chat/completions"
) -> tuple[dict[str, Any], httpx.Response]:
    """The body that reaches vLLM's handler, and the response."""
    async with client_of(app) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return json.loads(response.json()["raw"]), response


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_recipe_becomes_the_engines_name_and_nothing_else_changes(make_app: MakeApp, path: str) -> None:
    app, harness = make_app()
    rest = {"messages": [{"role": "user", "content": "grüße"}], "n": 2, "tools": [], "stream": False, "temperature": 0.5}
    body, response = await reached(app, {"model": "math*0.7+code", **rest}, path)
    recipe = harness.recipe("math*0.7+code")
    assert body == {"model": recipe.name, **rest}
    assert response.headers["x-loramix-key"] == recipe.key
    assert response.headers["x-loramix-cache"] == "merged"
    assert float(response.headers["x-loramix-merge-ms"]) >= 0
    assert response.json()["leases"] == 1
    assert harness.metric("loramix_leases") == 0


async def test_the_second_request_is_served_from_the_device(make_app: MakeApp) -> None:
    app, _ = make_app()
    await reached(app, {"model": "math+code"})
    _, response = await reached(app, {"model": "code+math"})
    assert response.headers["x-loramix-cache"] == "device"
    assert response.headers["x-loramix-merge-ms"] == "0.0"


async def test_an_object_an_expression_a_preset_and_an_adapter_all_name_recipes(make_app: MakeApp) -> None:
    app, harness = make_app()
    lora = {"method": "lego", "adapters": [{"name": "math"}, {"name": "code"}], "rank": 4}
    by_object, _ = await reached(app, {"model": "tiny", "lora": lora})
    without_model, _ = await reached(app, {"lora": lora})
    by_preset, _ = await reached(app, {"model": "tutor"})
    assert by_object == without_model == by_preset == {"model": harness.recipe("lego-4(math+code)").name}
    by_name, _ = await reached(app, {"model": "style"})
    assert by_name == {"model": harness.recipe("style").name}


@pytest.mark.parametrize(
    "raw", [b'{"model": "tiny", "x":1}', b'{"x":1}', b"no json", b"[1]", b'{"model": 3}', b'{"model": null}', b""]
)
async def test_a_request_for_the_base_model_or_one_that_vllm_must_refuse_goes_through_untouched(
    make_app: MakeApp, raw: bytes
) -> None:
    app, harness = make_app()
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", content=raw)
    assert response.json()["raw"] == raw.decode()
    assert "x-loramix-key" not in response.headers
    assert harness.engine.built == []


async def test_other_routes_go_through_untouched(make_app: MakeApp) -> None:
    app, harness = make_app()
    body, _ = await reached(app, {"model": "math", "lora": 1}, "/v1/embeddings")
    assert body == {"model": "math", "lora": 1}
    assert harness.engine.built == []


async def test_reading_text_needs_a_known_recipe_but_no_merge(make_app: MakeApp) -> None:
    app, harness = make_app()
    body, _ = await reached(app, {"model": "math+code", "prompt": "x"}, "/tokenize")
    assert body == {"model": "tiny", "prompt": "x"}
    assert harness.engine.built == []
    async with client_of(app) as client:
        assert (await client.post("/tokenize", json={"model": "maths"})).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "kind", "param", "message"),
    [
        ({"model": "maths"}, 404, "NotFoundError", "model", "did you mean 'math'"),
        ({"model": "cat(math+cod)"}, 404, "NotFoundError", "model", "did you mean 'code'"),
        ({"model": "cat(math"}, 400, "BadRequestError", "model", "cat(math\n          ^"),
        ({"model": "math*0"}, 400, "BadRequestError", "weight", "name the base model"),
        ({"model": "linear(math+style)"}, 400, "BadRequestError", "method", "equal rank"),
        ({"model": "cat(math+code+style)"}, 400, "BadRequestError", "rank", "svd-8"),
        ({"model": "svd-11(math+code+style)"}, 400, "BadRequestError", "rank", "use 10 or less"),
        ({"lora": {"adapters": [{"name": "math", "w": 1}]}}, 400, "BadRequestError", "lora.adapters.0.w", "not permitted"),
        ({"model": "math", "lora": {"adapters": [{"name": "code"}]}}, 400, "BadRequestError", "lora", "both"),
        ({"model": "math", "background": True}, 400, "BadRequestError", "background", "background: false"),
    ],
)
async def test_bad_input_is_answered_in_openais_form(
    make_app: MakeApp, body: dict[str, Any], status: int, kind: str, param: str, message: str
) -> None:
    app, harness = make_app()
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json=body)
        error = response.json()["error"]
        assert response.status_code == error["code"] == status
        assert (error["type"], error["param"]) == (kind, param)
        assert message in error["message"]
        assert (await client.post("/v1/chat/completions", json={"model": "math"})).status_code == 200  # the server goes on
    assert harness.metric("loramix_leases") == 0


async def test_a_server_without_a_free_slot_says_when_to_try_again(make_app: MakeApp) -> None:
    app, harness = make_app(slots=1, timeout=0.01)
    lease = await harness.composer.ensure(harness.recipe("math"), "client")
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json={"model": "code"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    lease.release()


async def test_a_merge_without_memory_says_when_to_try_again_and_others_are_served(make_app: MakeApp) -> None:
    app, harness = make_app()
    harness.engine.failures[harness.recipe("math").key] = OutOfMemoryError("the device has no memory left for this merge")
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json={"model": "math"})
        assert (await client.post("/v1/chat/completions", json={"model": "code"})).status_code == 200
    assert response.status_code == response.json()["error"]["code"] == 503
    assert "no memory left" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1


async def test_a_failed_merge_is_answered_and_leaves_no_lease(make_app: MakeApp) -> None:
    app, harness = make_app()
    harness.engine.failures[harness.recipe("math").key] = RuntimeError("unheard of")
    async with client_of(app) as client:
        assert (await client.post("/v1/chat/completions", json={"model": "math"})).status_code == 500
    assert harness.metric("loramix_leases") == 0


async def test_a_handler_that_fails_leaves_no_lease(make_app: MakeApp) -> None:
    app, harness = make_app()

    async def fail() -> None:
        raise ValueError("handler")

    app.post("/v1/chat/completions/batch")(fail)
    async with client_of(app) as client:
        assert (await client.post("/v1/chat/completions/batch", json={"model": "math"})).status_code == 500
    assert harness.metric("loramix_leases") == 0


class Connection:
    """One request driven at the ASGI border, where a client can leave at any moment."""

    def __init__(self, app: FastAPI, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "server": ("test", 80), "client": ("test", 1), "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self.inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_client_that_leaves_while_its_adapter_is_merged_leaves_no_lease(make_app: MakeApp) -> None:
    app, harness = make_app(hold=True)
    connection = Connection(app, {"model": "math"})
    await settle()
    assert harness.metric("loramix_leases") == 1
    connection.leave()
    await asyncio.wait_for(connection.task, 1)
    assert harness.metric("loramix_leases") == harness.metric("loramix_waiting_requests") == 0
    assert connection.sent == []
    (dropped,) = harness.engine.dropped  # the merge goes with the only one who waited for it
    dropped.set_result(None)
    await settle()


@pytest.mark.parametrize("ready", [False, True], ids=["while it waits", "as it gets its adapter"])
async def test_a_request_that_the_server_ends_leaves_no_lease(make_app: MakeApp, ready: bool) -> None:
    app, harness = make_app(hold=True)
    connection = Connection(app, {"model": "math"})
    await settle()
    assert harness.metric("loramix_leases") == 1
    if ready:
        harness.engine.finish(harness.recipe("math"))
        await asyncio.sleep(0)
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    await settle()
    assert harness.metric("loramix_leases") == harness.metric("loramix_waiting_requests") == 0


def add_stream(app: FastAPI) -> asyncio.Event:
    """A streaming handler that sends one chunk, then waits for the event before the last."""
    go_on = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"first"
        await go_on.wait()
        yield b"last"

    async def stream(request: Request) -> StreamingResponse:
        await request.json()
        return StreamingResponse(chunks())

    app.post("/v1/chat/completions/batch")(stream)
    return go_on


async def test_a_lease_lasts_until_the_stream_has_ended(make_app: MakeApp) -> None:
    app, harness = make_app()
    go_on = add_stream(app)
    connection = Connection(app, {"model": "math"}, "/v1/chat/completions/batch")
    await settle()
    assert [message.get("body") for message in connection.sent] == [None, b"first"]
    assert harness.metric("loramix_leases") == 1
    go_on.set()
    await asyncio.wait_for(connection.task, 1)
    assert harness.metric("loramix_leases") == 0


async def test_a_listener_that_stops_listening_does_not_end_the_response(make_app: MakeApp) -> None:
    app, _ = make_app()

    async def listen_then_answer(request: Request) -> JSONResponse:
        await request.body()
        listener = asyncio.create_task(request.receive())  # vLLM listens so while it works, to notice a client that leaves
        await settle()
        listener.cancel()
        await settle()
        second = asyncio.create_task(request.receive())
        await settle()
        return JSONResponse({"listening": not second.done()})

    app.post("/v1/chat/completions/batch")(listen_then_answer)
    connection = Connection(app, {"model": "math"}, "/v1/chat/completions/batch")
    await asyncio.wait_for(connection.task, 1)
    assert connection.sent[-1]["body"] == b'{"listening":true}'


async def test_a_client_that_leaves_mid_stream_gives_up_its_lease(make_app: MakeApp) -> None:
    app, harness = make_app()
    add_stream(app)
    connection = Connection(app, {"model": "math"}, "/v1/chat/completions/batch")
    await settle()
    connection.leave()
    await asyncio.wait_for(connection.task, 1)
    assert harness.metric("loramix_leases") == 0
