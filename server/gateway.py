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

from starlette._utils import get_route_path  # as the router sees a path: without --root-path
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from merging import LoramixError
from server.body import read_body
from server.caller import caller_of
from server.errors import DrainingError, RequestError
from server.first_token import kind_of, timed
from server.lease import Lease
from server.reply import reply_of
from server.request_id import facts_of
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
        facts = facts_of(scope)
        lease, gone = None, None
        try:
            if service.draining.is_set():
                raise DrainingError("this server is being shut down and takes nothing new; ask another, or try again shortly")
            body = await read_body(scope, receive, service.max_body_bytes)
            if body is None:
                return  # the client left before it had sent everything
            facts.read = time.time_ns()
            with _too_deep_is_refused():
                payload = _parsed(body)
                facts_of(scope, payload)
                recipe = facts.recipe = None if payload is None else service.recipe_of(payload, caller)
            facts.parsed = time.time_ns()
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
            lease = facts.lease = await _unless(gone, service.composer.ensure(recipe, caller.name))
            if lease is None:
                return
            payload["model"] = lease.name
            send = timed(send, started, metrics.first_token.labels(kind=kind_of(recipe), tier=lease.tier))
            await self.app(scope, _replay(_encoded(payload), receive, gone), _with_headers(send, lease))
        except LoramixError as error:
            facts.error = error
            metrics.count_refusal(error)
            await reply_of(error)(scope, receive, send)
        finally:
            if gone is not None:
                gone.cancel()
            if lease is not None:
                lease.release()


async def _unless(gone: asyncio.Task[Message], ensure: Coroutine[Any, Any, Lease]) -> Lease | None:
    """The lease, or None (and the wait cancelled) where the client leaves first."""
    task = asyncio.create_task(ensure)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:  # the server ends this request, and nobody is left to take the lease
        task.add_done_callback(_give_back)
        task.cancel()
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    return None if task.cancelled() else task.result()


def _give_back(ended: asyncio.Task[Lease]) -> None:
    if not ended.cancelled() and ended.exception() is None:
        ended.result().release()


async def _next(receive: Receive) -> Message:
    return await receive()


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
