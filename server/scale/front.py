"""The front: reads each request, names its session, and passes on what a replica answers. Plain ASGI; knows nothing of Ray.

A replica that is lost before its answer has begun costs the client nothing but time: generation may be done twice, but is
answered once. A stream that has begun ends with an event that says so.
"""

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from merging import LoramixError
from server.body import read_body
from server.errors import BusyError, body_of
from server.gateway import GENERATING, READING
from server.reply import reply_of
from server.scale.sessions import NONE, Sessions

RawHeaders = list[tuple[bytes, bytes]]
_ATTEMPTS = 2
_ENDS = (b"\n\n", b"\n\r\n")  # of an event, with line ends of either kind
# What belongs to one connection, and not to what is passed on (RFC 9110, 7.6.1); either side of it writes its own.
_OF_A_CONNECTION = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"}
)


class ReplicaLostError(BusyError):
    """The replica that was asked has ended, or cannot be reached."""


@dataclass(frozen=True)
class Asked:
    """A request as replicas get it. `target` is its path and query."""

    method: str
    target: str
    headers: RawHeaders
    body: bytes


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: RawHeaders


Answer = AsyncGenerator[Head | bytes]
"""The head, then the body in pieces. Raises ReplicaLostError at any point."""

Ask = Callable[[Asked, str], Answer]
"""Asks a replica: (request, session) -> its answer."""


class Front:
    """ASGI application in front of replicas.

    Args:
        ask: reaches a replica.
        max_body_bytes: what is read of a request's body at most.
    """

    def __init__(self, ask: Ask, sessions: Sessions, max_body_bytes: int) -> None:
        self._ask = ask
        self._sessions = sessions
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
            if body is None:
                return  # the client left before it had sent everything
            generating = scope["method"] == "POST" and scope["path"] in GENERATING | READING
            session = self._sessions.of(body) if generating else NONE
            attempts = _ATTEMPTS if generating or scope["method"] in ("GET", "HEAD") else 1
            head, first, rest = await self._begun(asked_of(scope, body), session, attempts)
        except LoramixError as error:
            await reply_of(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": head.status, "headers": head.headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async with aclosing(rest):  # a client that leaves is a task that is cancelled, and the replica has to hear of it
            try:
                async for chunk in rest:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except ReplicaLostError as error:
                await send({"type": "http.response.body", "body": _last_event(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begun(self, asked: Asked, session: str, attempts: int) -> tuple[Head, bytes, AsyncGenerator[bytes]]:
        """The answer's head, the first of its body, and the rest: nothing, unless it is a stream of events."""
        while True:
            attempts -= 1
            answer = self._ask(asked, session)
            try:
                head = await anext(answer)
                assert isinstance(head, Head), "an answer begins with its head"
                body = _events(answer) if _is_stream(head) else _whole(answer)
                return head, await anext(body), body
            except ReplicaLostError:
                if not attempts:
                    raise


def asked_of(scope: Scope, body: bytes) -> Asked:
    """The request, with the client's address as Ray's proxy knows it: replicas share their slots fairly among addresses."""
    headers = [pair for pair in passed_on(scope["headers"]) if pair[0] != b"x-forwarded-for"]
    if scope.get("client"):
        headers.append((b"x-forwarded-for", scope["client"][0].encode()))
    query = f"?{scope['query_string'].decode('latin-1')}" if scope.get("query_string") else ""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return Asked(scope["method"], path.decode("latin-1") + query, headers, body)


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Headers without those of the connection."""
    lower = [(name.lower(), value) for name, value in headers]
    return [(name, value) for name, value in lower if name not in _OF_A_CONNECTION]


def _is_stream(head: Head) -> bool:
    return Headers(raw=head.headers).get("content-type", "").startswith("text/event-stream")


async def _whole(answer: Answer) -> AsyncGenerator[bytes]:
    """All of the body in one piece."""
    async with aclosing(answer):
        yield b"".join([_bytes(piece) async for piece in answer])


async def _events(answer: Answer) -> AsyncGenerator[bytes]:
    """The body, cut where an event ends, so that what follows a lost replica is an event of its own. Never without a piece."""
    held, some = b"", False
    async with aclosing(answer):
        async for piece in answer:
            held += _bytes(piece)
            if end := max((place + len(mark) for mark in _ENDS if (place := held.rfind(mark)) >= 0), default=0):
                some = True
                yield held[:end]
                held = held[end:]
    if held or not some:
        yield held


def _bytes(piece: Head | bytes) -> bytes:
    assert isinstance(piece, bytes), "an answer has one head"
    return piece


def _last_event(error: LoramixError) -> bytes:
    """In a form that clients of OpenAI's and of Anthropic's routes take for an error."""
    return f"event: error\ndata: {json.dumps({'type': 'error', **body_of(error)})}\n\n".encode()
