"""The front before replicas that answer, and are lost, as told."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import openai
import pytest

from server.scale.front import Answer, Asked, Front, Head, ReplicaLostError
from server.scale.sessions import NONE, Sessions

EVENTS = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
JSON = Head(200, [(b"content-type", b"application/json")])
LOST = ReplicaLostError("it has ended")
CHAT = {"model": "a+b", "messages": []}


class Replicas:
    """Answer in turn with what they are given, an error being the loss of the one that is asked."""

    def __init__(self, *answers: Sequence[Head | bytes | ReplicaLostError]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[Asked, str]] = []
        self.closed = 0

    async def ask(self, asked: Asked, session: str) -> Answer:
        self.asked.append((asked, session))
        try:
            for piece in self._answers.pop(0):
                if isinstance(piece, ReplicaLostError):
                    raise piece
                yield piece
        finally:
            self.closed += 1


async def post(replicas: Replicas, path: str = "/v1/chat/completions", body: Any = CHAT, **options: Any) -> httpx.Response:
    front = Front(replicas.ask, Sessions(["base"], "cat", {}), max_body_bytes=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://front") as client:
        return await client.request(options.pop("method", "POST"), path, json=body, **options)


async def test_an_answer_is_passed_on_as_it_is() -> None:
    replicas = Replicas([Head(418, [(b"x-of-it", b"1")]), b"tea", b"pot"])
    reply = await post(replicas, "/v1/chat/completions?a=%20b", headers={"x-mine": "2"})
    assert (reply.status_code, reply.text, reply.headers["x-of-it"]) == (418, "teapot", "1")
    ((asked, session),) = replicas.asked
    assert (asked.method, asked.target, json.loads(asked.body)) == ("POST", "/v1/chat/completions?a=%20b", CHAT)
    assert (b"x-mine", b"2") in asked.headers
    assert session != NONE


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/lora/presets"])
async def test_only_generation_has_a_session(path: str) -> None:
    replicas = Replicas([JSON, b"{}"], [JSON, b"{}"])
    await post(replicas, path)
    await post(replicas, body={"model": "base"})
    assert [session for _, session in replicas.asked] == [NONE, NONE]


@pytest.mark.parametrize("lost", [[LOST], [JSON, LOST], [JSON, b"{", LOST], [EVENTS, LOST], [EVENTS, b"data: half", LOST]])
async def test_what_has_not_begun_is_asked_again(lost: list[Any]) -> None:
    replicas = Replicas(lost, [JSON, b"{}"])
    assert (await post(replicas)).json() == {}
    assert len({session for _, session in replicas.asked}) == 1


async def test_but_once_only() -> None:
    replicas = Replicas([LOST], [LOST], [JSON, b"{}"])
    reply = await post(replicas)
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["message"] == "it has ended"
    assert len(replicas.asked) == 2


async def test_what_may_have_changed_something_is_never_asked_again() -> None:
    replicas = Replicas([LOST], [JSON, b"{}"])
    assert (await post(replicas, "/v1/lora/presets")).status_code == 503
    assert (await post(Replicas([LOST], [JSON, b"{}"]), "/v1/models", method="GET")).status_code == 200


@pytest.mark.parametrize("half", [b"", b'data: {"hal', b"data: {}\n"])
async def test_a_stream_that_is_lost_ends_with_an_event_of_its_own(half: bytes) -> None:
    replicas = Replicas([EVENTS, b"data: 1\n", b"\ndata: 2\n\n" + half, LOST], [JSON, b"{}"])
    reply = await post(replicas)
    first, second, (event, data) = (part.split("\n") for part in reply.text.removesuffix("\n\n").split("\n\n"))
    assert (first, second, event) == (["data: 1"], ["data: 2"], "event: error")
    error = json.loads(data.removeprefix("data: "))
    assert error["type"] == "error"
    assert error["error"]["code"] == 503
    assert len(replicas.asked) == 1


def lost_after(first: str, http: Any = httpx) -> Any:
    """A client of the package `http` whose only answer is a stream that is lost after this."""
    front = Front(Replicas([EVENTS, first.encode(), LOST]).ask, Sessions(["base"], "cat", {}), 1000)
    return http.AsyncClient(transport=http.ASGITransport(front))


async def test_clients_of_openai_raise_it() -> None:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "a", "choices": []}
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://front/v1", http_client=lost_after(f"data: {json.dumps(chunk)}\n\n")
    ) as client:
        stream = await client.chat.completions.create(model="a", messages=[], stream=True)
        assert (await anext(stream)).id == "1"
        with pytest.raises(openai.APIError, match="it has ended"):
            await anext(stream)


async def test_clients_of_anthropic_raise_it() -> None:
    anthropic = pytest.importorskip("anthropic", reason="vLLM brings it")
    http = lost_after('event: ping\ndata: {"type": "ping"}\n\n', pytest.importorskip("httpx2"))
    async with anthropic.AsyncAnthropic(api_key="none", base_url="http://front", http_client=http) as client:
        stream = await client.messages.create(model="a", max_tokens=1, messages=[], stream=True)
        with pytest.raises(anthropic.APIStatusError, match="it has ended"):
            [_ async for _ in stream]


async def test_events_are_not_held_back_whatever_their_line_ends() -> None:
    for end in ("\n\n", "\r\n\r\n"):
        replicas = Replicas([EVENTS, *[f"data: {number}{end}".encode() for number in range(3)], LOST])
        assert (await post(replicas)).text.startswith("".join(f"data: {number}{end}" for number in range(3)) + "event: error")


@pytest.mark.parametrize("pieces", [[], [b"data: 1"], [b"data: 1\n\nda", b"ta: 2\n\n"], [b"data: 1\n\n", b"data: 2"]])
async def test_a_stream_is_whole_wherever_it_was_cut(pieces: list[bytes]) -> None:
    assert (await post(Replicas([EVENTS, *pieces]))).content == b"".join(pieces)


async def test_a_body_over_the_limit_reaches_no_replica() -> None:
    replicas = Replicas()
    assert (await post(replicas, body={"model": "a" * 1000})).status_code == 413
    assert not replicas.asked


async def test_a_client_that_leaves_closes_the_answer() -> None:
    replicas = Replicas([EVENTS, *[b"data: 1\n\n"] * 5])
    front = Front(replicas.ask, Sessions(["base"], "cat", {}), max_body_bytes=1000)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "client": None}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    sent = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await front(scope, receive, send)  # type: ignore[arg-type]
    assert replicas.closed == 1


def test_the_answers_are_what_the_front_asks_for() -> None:
    assert isinstance(Replicas([]).ask(Asked("GET", "/", [], b""), NONE), AsyncGenerator)
