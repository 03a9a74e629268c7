"""What is known of the request at hand: its log lines and its spans are made of it.

The gateway fills it in as it learns. Tasks that a request begins, such as the build of its recipe, know the request by it too.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every process that writes a log line imports this file
    from merging import LoramixError
    from server.catalog import Recipe
    from server.lease import Lease


@dataclass
class RequestFacts:
    """One request; what is not known yet, or does not apply to it, is None.

    Attributes:
        id: its id, the client's or a new one (see server/request_id.py).
        given: whether the id came with the request.
        read: when its body had come, in ns since the epoch.
        parsed: when its recipe was known, in ns since the epoch.
        recipe: what it asks for; None for the base model.
        lease: what it was given.
        error: why it was refused.
    """

    id: str
    given: bool = False
    read: int | None = None
    parsed: int | None = None
    recipe: Recipe | None = None
    lease: Lease | None = None
    error: LoramixError | None = None


_current: ContextVar[RequestFacts | None] = ContextVar("loramix.request", default=None)


def begin(facts: RequestFacts | None) -> None:
    """From here on the calling task or thread, and each task that it starts, is about that request, or about none."""
    _current.set(facts)


def current() -> RequestFacts | None:
    """The request at hand, if there is one."""
    return _current.get()
