"""What the admin routes under /v1/lora share: how they are read, answered and refused. server/access.py says who may ask."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Message

from merging import LoramixError
from merging.errors import shown
from server.admin import Admin
from server.body import read_body
from server.errors import DrainingError, RequestError
from server.reply import reply_of
from server.service import Service

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128, examples=["math"])]
"""Of what is added while the server runs: it also names a file, and stands in a path."""
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_REASONS = {
    400: "What was sent cannot be used; the message says what is wrong and what to do.",
    403: "Adapters may not be added from there; or the key is none of an admin.",
    404: "It names what is not there.",
    409: "It does not go with what is there; the message says what has to go first.",
    503: "It cannot be done now; try again after Retry-After seconds.",
}


class Fault(BaseModel):
    """What is wrong: in words, and where. `code` is the status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """Every error, as OpenAI's clients expect it."""

    error: Fault


def admin_router(tag: str) -> APIRouter:
    """A router of admin routes."""
    return APIRouter(prefix="/v1/lora", tags=[tag], route_class=AdminRoute)


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its description."""
    rest = {"model": ErrorReply, "description": "Any other error: 401, 403, 413, 500."}
    return {**{code: {"model": ErrorReply, "description": _REASONS[code]} for code in codes}, "default": rest}


def admin_of(request: Request) -> Admin:
    admin: Admin = request.app.state.loramix_admin
    return admin


class AdminRoute(APIRoute):
    """Reads no more of a body than the server does elsewhere, answers errors in one form, and finishes what was begun."""

    def get_route_handler(self) -> _Handler:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            service: Service = request.app.state.loramix
            try:
                return await _answer(request, handler, service)
            except LoramixError as error:
                service.composer.metrics.count_refusal(error)
                return reply_of(error)

        return answer


async def _answer(request: Request, handler: _Handler, service: Service) -> Response:
    if request.method != "GET" and service.draining.is_set():
        raise DrainingError("this server is being shut down and changes nothing any more; ask another")
    body = await read_body(request.scope, request.receive, service.max_body_bytes)
    if body is None:
        return Response(status_code=499)  # the client left before it had sent everything; nobody reads this

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    doing = asyncio.ensure_future(handler(Request(request.scope, receive)))
    _doing.add(doing)
    doing.add_done_callback(_doing.discard)
    try:
        return await asyncio.shield(doing)  # whether or not the client waits for it
    except RequestValidationError as error:
        raise _readable(error) from None
    except HTTPException as error:
        raise RequestError(f"the body cannot be read ({error.detail}); send JSON") from None


_doing: set[asyncio.Future[Response]] = set()


def _readable(error: RequestValidationError) -> RequestError:
    first = error.errors()[0]
    where = ".".join(str(part)[:64] for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return RequestError(f"the body is no JSON ({first['ctx']['error']} at {where})")
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{where or 'body'}: {message[:1].lower()}{message[1:]} (got {shown(first['input'])})", where or None)
