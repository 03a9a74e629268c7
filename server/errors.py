"""What a request can be told, and how: every error of loramix in OpenAI's form.

LoramixError (merging)
├── RecipeError (merging)     400   the recipe cannot be merged
│   └── RecipeSyntaxError     400   the expression cannot be read; points at the place
├── AdapterError (merging)    400   a source adapter turned out to be unusable
├── RequestError              400   the request's body is at fault
├── UnknownModelError         404   no base model, adapter or preset of that name
├── BusyError                 503   every slot is in use, or building took too long; try again
│   └── OutOfMemoryError      503   the device has no memory left for the merge; try again
└── ConfigError               —     the server cannot start as it was told to
"""

from http import HTTPStatus
from typing import Any

from merging import AdapterError, LoramixError, RecipeError
from merging.errors import one_line

RETRY_AFTER_SECONDS = 1
_SHOWN = 200  # characters of an expression on either side of its fault


class RecipeSyntaxError(RecipeError):
    """An expression that cannot be read; the message shows a caret under the place."""

    def __init__(self, message: str, expression: str, position: int) -> None:
        before = one_line(expression[max(position - _SHOWN, 0) : position])
        after = one_line(expression[position : position + _SHOWN])
        before = ("…" if position > _SHOWN else "") + before
        after += "…" if len(expression) > position + _SHOWN else ""
        super().__init__(f"{message}\n  {before}{after}\n  {' ' * len(before)}^", "model")


class RequestError(LoramixError):
    """A request whose body is at fault; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(one_line(message))
        self.param = None if param is None else one_line(param)


class UnknownModelError(LoramixError):
    """A name that is neither base model, adapter nor preset."""


class BusyError(LoramixError):
    """Nothing is wrong with the request, but it cannot be served now."""


class OutOfMemoryError(BusyError):
    """The device had no memory left for a merge."""


class ConfigError(LoramixError):
    """The server cannot start as it was told to."""


def status_of(error: LoramixError) -> HTTPStatus:
    """The HTTP status that an error is answered with."""
    match error:
        case UnknownModelError():
            return HTTPStatus.NOT_FOUND
        case BusyError():
            return HTTPStatus.SERVICE_UNAVAILABLE
        case RecipeError() | RequestError() | AdapterError():
            return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def body_of(error: LoramixError) -> dict[str, Any]:
    """The JSON body: `{"error": {message, type, param, code}}`, with types named as vLLM names them."""
    status = status_of(error)
    kinds = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    param = "model" if isinstance(error, UnknownModelError) else getattr(error, "param", None)
    return {
        "error": {"message": str(error), "type": kinds.get(status, "InternalServerError"), "param": param, "code": int(status)}
    }


def headers_of(error: LoramixError) -> dict[str, str]:
    """Extra response headers: when to try again, where that helps."""
    return {"retry-after": str(RETRY_AFTER_SECONDS)} if isinstance(error, BusyError) else {}
