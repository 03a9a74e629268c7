"""What a request can be told, and how: every error of loramix in OpenAI's form.

LoramixError (merging)
├── RecipeError (merging)     400   the recipe cannot be merged
│   ├── RecipeSyntaxError     400   the expression cannot be read; points at the place
│   └── LimitError            400   the recipe is over one of the server's limits
├── AdapterError (merging)    400   a source adapter turned out to be unusable
├── RequestError              400   the request's body is at fault
├── UnauthorizedError         401   the request has no key of this server
├── ForbiddenError            403   its key does not open this route, or adapters may not come from there
├── UnknownModelError         404   no base model, adapter or preset of that name
├── NotFoundError             404   what an admin names is not there
├── ConflictError             409   what an admin asks for does not go with what is there
├── TooLargeError             413   the request's body is larger than this server reads
├── RateLimitedError          429   the client has had its merges of this minute; says when to try again
├── BusyError                 503   every slot is in use, or building took too long; try again
│   ├── OverloadedError       503   too many merges wait for a slot already; try again
│   ├── DrainingError         503   the server is being shut down; ask another
│   ├── EngineDiedError       503   the engine has died, and the server ends; ask another
│   └── OutOfMemoryError      503   the device has no memory left for the merge; try again
├── StateError                500   the state folder could not be written
└── ConfigError               —     the server cannot start as it was told to
"""

from http import HTTPStatus
from typing import Any

from merging import AdapterError, LoramixError, RecipeError
from merging.errors import one_line

RETRY_AFTER_SECONDS = 1
_LONGEST_TEXT = 9000  # characters; messages quote what they are about, an expression twice at most
_SHOWN = 200  # characters of an expression on either side of its fault


class RecipeSyntaxError(RecipeError):
    """An expression that cannot be read; the message shows a caret under the place."""

    def __init__(self, message: str, expression: str, position: int) -> None:
        before = one_line(expression[max(position - _SHOWN, 0) : position])
        after = one_line(expression[position : position + _SHOWN])
        before = ("…" if position > _SHOWN else "") + before
        after += "…" if len(expression) > position + _SHOWN else ""
        super().__init__(f"{message}\n  {before}{after}\n  {' ' * len(before)}^", "model")


class LimitError(RecipeError):
    """A recipe over one of the server's limits: adapters, rank, length of the expression."""


class RequestError(LoramixError):
    """A request whose body is at fault; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(one_line(message))
        self.param = None if param is None else one_line(param)


class UnauthorizedError(LoramixError):
    """A request without a key, or with one that this server does not know."""


class ForbiddenError(LoramixError):
    """A route that is closed, or that the request's key does not open; or a place from which adapters may not be added."""


class UnknownModelError(LoramixError):
    """A name that is neither base model, adapter nor preset."""


class NotFoundError(LoramixError):
    """An adapter, preset or merged adapter that an admin names and that is not there."""


class ConflictError(LoramixError):
    """A change that does not go with what is there; the message says what has to go first."""


class TooLargeError(LoramixError):
    """A body that is not read to its end."""


class RateLimitedError(LoramixError):
    """A client that asks for too many new merges; `retry_after` is the seconds until it may have another."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BusyError(LoramixError):
    """Nothing is wrong with the request, but it cannot be served now."""


class OverloadedError(BusyError):
    """More merges wait for a slot than the server lets wait."""


class DrainingError(BusyError):
    """The server finishes what it has, and takes nothing new."""


class EngineDiedError(BusyError):
    """The engine's process was killed or failed; nothing can be served any more."""


class OutOfMemoryError(BusyError):
    """The device had no memory left for a merge."""


class StateError(LoramixError):
    """The state folder could not be written, and nothing was changed."""


class ConfigError(LoramixError):
    """The server cannot start as it was told to."""


def status_of(error: LoramixError) -> HTTPStatus:
    """The HTTP status that an error is answered with."""
    match error:
        case UnauthorizedError():
            return HTTPStatus.UNAUTHORIZED
        case ForbiddenError():
            return HTTPStatus.FORBIDDEN
        case UnknownModelError() | NotFoundError():
            return HTTPStatus.NOT_FOUND
        case ConflictError():
            return HTTPStatus.CONFLICT
        case TooLargeError():
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        case RateLimitedError():
            return HTTPStatus.TOO_MANY_REQUESTS
        case BusyError():
            return HTTPStatus.SERVICE_UNAVAILABLE
        case RecipeError() | RequestError() | AdapterError():
            return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def body_of(error: LoramixError) -> dict[str, Any]:
    """The JSON body: `{"error": {message, type, param, code}}`, with types named as vLLM names them."""
    status = status_of(error)
    kinds = {
        400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
        409: "ConflictError", 413: "RequestTooLargeError", 429: "RateLimitError",
        503: "ServiceUnavailableError",
    }  # fmt: skip
    param = "model" if isinstance(error, UnknownModelError) else getattr(error, "param", None)
    kind = kinds.get(status, "InternalServerError")
    return {"error": {"message": _sendable(str(error)), "type": kind, "param": param and _sendable(param), "code": int(status)}}


def headers_of(error: LoramixError) -> dict[str, str]:
    """Extra response headers: when to try again, where that helps; that a body is read no further; how to say who asks."""
    match error:
        case UnauthorizedError():
            return {"www-authenticate": "Bearer", "connection": "close"}
        case RateLimitedError():
            return {"retry-after": str(error.retry_after)}
        case BusyError():
            return {"retry-after": str(RETRY_AFTER_SECONDS)}
        case TooLargeError() | ForbiddenError():
            return {"connection": "close"}
    return {}


def refusal_of(error: LoramixError) -> str | None:
    """The reason under which a request counts as refused (see Metrics.refused); None for one that is wrong or fails."""
    match error:
        case RateLimitedError():
            return "rate"
        case OverloadedError():
            return "queue"
        case OutOfMemoryError():
            return "memory"
        case DrainingError():
            return "draining"
        case EngineDiedError():
            return "engine"
        case BusyError():
            return "deadline"
        case TooLargeError():
            return "body"
        case LimitError():
            return "recipe"
    return None


def _sendable(text: str) -> str:
    """`text`, cut, without halves of surrogate pairs, which JSON can bring and UTF-8 cannot say."""
    shown = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
    return shown.encode(errors="replace").decode()
