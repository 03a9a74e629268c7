"""Spans of generation requests, for OpenTelemetry: there only where vLLM's tracing is on, and no file else imports it.

    loramix.request          from the request's first byte to the last of its answer; the client's `traceparent` is its parent
    ├── loramix.parse        reading the body's object and the recipe in it
    ├── loramix.wait         for a slot
    ├── loramix.commit       in the engine's thread, which decodes nothing meanwhile
    ├── loramix.merge        one span in it for each phase, as far as there was one: `queue`, `disk`, `load`, `copy`, `merge`
    └── llm_request          vLLM's own

Workers report how long each phase took, not when: phases are laid end to end, up to the moment at which the report came.
A request that joins a build under way has `loramix.merge` from its own beginning, and no phases.
"""

import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.gateway import GENERATING
from server.lease import Built
from server.request_facts import RequestFacts
from server.request_id import facts_of, set_header

_W3C = TraceContextTextMapPropagator()
_PHASES = ("queue", "disk", "load", "copy", "merge")


class Tracing:
    """ASGI middleware around the gateway. Refusals of server/access.py have no spans: strangers could send any number."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None = None) -> None:
        self.app = app
        self._tracer = tracer or trace.get_tracer("loramix")  # of the provider that vLLM sets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or get_route_path(scope) not in GENERATING:
            await self.app(scope, receive, send)
            return
        context = _W3C.extract(Headers(scope=scope))
        span = self._tracer.start_span("loramix.request", context, SpanKind.SERVER)
        inner = trace.set_span_in_context(span, context)
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, inner)
        for name, value in carrier.items():
            set_header(scope, name, value)  # vLLM makes its span a child of what it finds there

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
            await send(message)

        facts = facts_of(scope)
        try:
            await self.app(scope, receive, watch)
        except BaseException as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.set_attribute("url.path", get_route_path(scope))
            if span.is_recording():
                self._tell(span, inner, facts)
            span.end()

    def _tell(self, span: Span, inner: Context, facts: RequestFacts) -> None:
        """The span's attributes and children; nothing of what the request says to the model."""
        span.set_attributes(_attributes(facts))
        if facts.error is not None:
            span.set_status(StatusCode.ERROR, type(facts.error).__name__)
        if facts.read is None:
            return
        now = time.time_ns()
        self._span("loramix.parse", facts.read, facts.parsed or now, inner, failed=facts.parsed is None)
        if facts.parsed is None or facts.recipe is None:
            return
        if facts.lease is None:
            self._span("loramix.wait", facts.parsed, now, inner, failed=facts.error is not None)
        elif facts.lease.built is not None:
            self._tell_build(facts.lease.built, facts.parsed, inner)

    def _tell_build(self, built: Built, asked: int, inner: Context) -> None:
        self._span("loramix.wait", asked, max(asked, built.slot), inner)
        if built.slot < asked:
            self._span("loramix.merge", asked, built.done, inner, joined=True)
            return
        phases = {name: round(built.seconds[name] * 1e9) for name in _PHASES if name in built.seconds}
        begun = built.done - sum(phases.values())
        self._span("loramix.commit", begun - round(built.seconds["commit"] * 1e9), begun, inner)
        merge = self._span("loramix.merge", begun, built.done, inner)
        within = trace.set_span_in_context(merge, inner)
        for name, length in phases.items():
            self._span(f"loramix.merge.{name}", begun, begun + length, within)
            begun += length

    def _span(self, name: str, start: int, end: int, parent: Context, *, joined: bool = False, failed: bool = False) -> Span:
        """A span that has begun and ended, in ns since the epoch."""
        span = self._tracer.start_span(name, parent, start_time=start)
        if joined:
            span.set_attribute("loramix.joined", True)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(end)
        return span


def _attributes(facts: RequestFacts) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {"loramix.request_id": facts.id}
    if facts.recipe is not None:
        spec = facts.recipe.spec
        attributes |= {"loramix.recipe": facts.recipe.name, "loramix.key": facts.recipe.key}
        attributes |= {"loramix.method": spec.method.name, "loramix.adapters": len(spec.terms)}
    if facts.lease is not None:
        attributes |= {"loramix.cache": facts.lease.tier, "loramix.wait_ms": facts.lease.waited_ms}
    if facts.error is not None:
        attributes["error.type"] = type(facts.error).__name__
    return attributes
