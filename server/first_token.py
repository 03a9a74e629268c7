"""Time to the first token of a streamed answer, as its client sees it: from the request's arrival, its merge included.

vLLM's own histogram begins once it has the request, so it knows neither the merge nor what was asked for. Gaps between tokens
need no such thing: one step of the engine decodes for all kinds of requests.
"""

import time

from prometheus_client import Histogram
from starlette.datastructures import Headers
from starlette.types import Message, Send

from server.catalog import Recipe

# What /v1/responses sends before there is a token.
_PREAMBLE = (b"event: response.created", b"event: response.in_progress")


def kind_of(recipe: Recipe) -> str:
    """`adapter` for a single one, `composition` for several."""
    return "adapter" if len(recipe.sources) == 1 else "composition"


def timed(send: Send, started: float, histogram: Histogram) -> Send:
    """A `send` that observes the seconds since `started` (of `time.perf_counter`) when the first token goes out.

    Only streams are counted: of another answer nobody sees the first token.
    """
    waiting = False

    async def timed_send(message: Message) -> None:
        nonlocal waiting
        await send(message)
        if message["type"] == "http.response.start":
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            waiting = message["status"] == 200 and content_type.startswith("text/event-stream")
        elif waiting and (body := message.get("body")) and not body.startswith(_PREAMBLE):
            waiting = False
            histogram.observe(time.perf_counter() - started)

    return timed_send
