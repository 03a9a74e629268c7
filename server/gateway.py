"""The gateway: reads each generation request, has its adapter made ready, and hands it to vLLM's own handler.

A pure ASGI middleware, so that streams stream and disconnects are seen. It changes two things of a request's body
(`model` becomes the engine's name, `lora` goes) and adds three headers to the response.
A body over the server's limit is refused as soon as that is known, and every request once the server is told to stop.
"""

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse
from starlette._utils import get_route_path  # as the router sees a path: without --root-path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merging import LoramixError
from server.caller import caller_of
from server.composer import Lease
from server.errors import DrainingError, RequestError, TooLargeError, body_of, headers_of, refusal_of, status_of
from server.first_token import kind_of, timed
from server.service import Service

# What vLLM serves for text generation; and the routes that only read text, for which no adapter need be merged.
GENERATING = frozenset(
    {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"}
)
READING = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})


class Gateway:
    """ASGI middleware; finds the Service in `app.state.loramix`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or get_route_path(scope) not in GENERATING | READING:
            await self.app(scope, receive, send)
            return
        service: Service = scope["app"].state.loramix
        caller = caller_of(scope)
        metrics, started = service.composer.metrics, time.perf_counter()
        lease, gone = None, None
        try:
            if service.draining.is_set():
                raise DrainingError("this server is being shut down and takes nothing new; ask another, or try again shortly")
            body = await _read(scope, receive, service.max_body_bytes)
            if body is None:
                return  # the client left before it had sent everything
            with _too_deep_is_refused():
                payload = _parsed(body)
                recipe = None if payload is None else service.recipe_of(payload, caller)
            if payload is None or recipe is None:
                send = timed(send, started, metrics.first_token.labels(kind="base", tier="none"))
                await self.app(scope, _replay(body, receive), send)
                return
            payload.pop("lora", None)
            if get_route_path(scope) in READING:
                payload["model"] = service.base_models[0]
                await self.app(scope, _replay(_encoded(payload), receive), send)
                return
            if payload.get("background"):
                raise RequestError("background responses outlive their adapter's lease; send background: false", "background")
            gone = asyncio.create_task(_next(receive))  # the next message can only be that the client left
            lease = await _unless(gone, service.composer.ensure(recipe, caller.name))
            if lease is None:
                return
            payload["model"] = lease.name
            send = timed(send, started, metrics.first_token.labels(kind=kind_of(recipe), tier=lease.tier))
            await self.app(scope, _replay(_encoded(payload), receive, gone), _with_headers(send, lease))
        except LoramixError as error:
            if (reason := refusal_of(error)) is not None:
                metrics.refused.labels(reason=reason).inc()
            await JSONResponse(body_of(error), status_of(error), headers_of(error))(scope, receive, send)
        finally:
            if gone is not None:
                gone.cancel()
            if lease is not None:
                lease.release()


async def _unless(gone: asyncio.Task[Message], ensure: Coroutine[Any, Any, Lease]) -> Lease | None:
    """The lease, or None (and the wait cancelled) where the client leaves first."""
    task = asyncio.create_task(ensure)
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    return None if task.cancelled() else task.result()


async def _next(receive: Receive) -> Message:
    return await receive()


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None where the client left. Raises TooLargeError once it is known to be over `limit` bytes."""
    announced = Headers(scope=scope).get("content-length", "")
    body, more = bytearray(), True
    too_large = announced.isdecimal() and int(announced[:18]) > limit  # 18 digits are over any limit
    while more and not too_large:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        too_large = len(body) > limit
    if too_large:
        raise TooLargeError(f"the body is over {limit / 2**20:g} MiB; send less, or raise this server's --max-body-mib")
    return bytes(body)


def _parsed(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body; None where there is none: vLLM says what is wrong with it."""
    try:
        payload = json.loads(body)
    except ValueError:
        return None
    return payload if isinstance(payload, dict) else None


def _encoded(payload: dict[str, Any]) -> bytes:
    with _too_deep_is_refused():
        return json.dumps(payload).encode()


@contextmanager
def _too_deep_is_refused() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise RequestError("the body's arrays and objects are nested too deeply; send a flatter one") from None


def _replay(body: bytes, receive: Receive, pending: asyncio.Task[Message] | None = None) -> Receive:
    """A receive that yields `body` first, then what comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        nonlocal pending
        if messages:
            return messages.pop()
        if pending is not None:
            # Shielded: whoever listens may stop listening, and the next listener must still hear.
            message = await asyncio.shield(pending)
            pending = None
            return message
        return await receive()

    return replay


def _with_headers(send: Send, lease: Lease) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-loramix-key"] = lease.key
            headers["x-loramix-cache"] = lease.tier
            headers["x-loramix-merge-ms"] = f"{lease.waited_ms:.1f}"
        await send(message)

    return with_headers
