"""Request ids: every request has one, in its answer, in its log lines, in its spans and in vLLM's own id of it."""

import re
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.request_facts import RequestFacts, begin, current

HEADER = "x-request-id"
_FIT = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # for logs and headers; what is not fit is as if it had not come


class RequestIds:
    """ASGI middleware around everything else: takes the client's id, or makes one, and puts it on the answer.

    What is behind it finds the id among the request's headers, where vLLM takes its own from.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        ids = Headers(scope=scope).getlist(HEADER)
        given = len(ids) == 1 and _FIT.fullmatch(ids[0]) is not None
        facts = RequestFacts(ids[0] if given else uuid4().hex, given)
        begin(facts)  # and no end: a server writes its last lines of a request once this has returned
        set_header(scope, HEADER, facts.id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = facts.id
            await send(message)

        await self.app(scope, receive, send_with_id)


def facts_of(scope: Scope, payload: Mapping[str, Any] | None = None) -> RequestFacts:
    """What is known of a request; with its body's object, in which vLLM lets clients name an id where no header does."""
    facts = current()
    if facts is None:  # no middleware in front
        facts = RequestFacts(uuid4().hex)
    named = None if payload is None else payload.get("request_id")
    if not facts.given and isinstance(named, str) and _FIT.fullmatch(named):
        facts.id, facts.given = named, True
        set_header(scope, HEADER, named)
    return facts


def set_header(scope: Scope, name: str, value: str) -> None:
    """Put a header on a request, in the place of all that it had of that name (lower case)."""
    kept = [pair for pair in scope["headers"] if pair[0].lower() != name.encode()]
    scope["headers"] = [*kept, (name.encode(), value.encode())]
