"""Access: who may do what, decided before anything of a request is read.

| routes | without keys | with keys |
|---|---|---|
| probes (`OPEN`) | everybody | everybody |
| what clients ask (`CLIENT`) | everybody | any key; one that is limited to some adapters, where they are checked (`CHECKED`) |
| loramix's admin routes (`ADMIN`) | nobody | an admin key |
| all others, with which vLLM is run (`/sleep`, `/pause`, …) | everybody | an admin key |
| loading adapters past loramix (`CLOSED`) | nobody | nobody |
"""

from starlette._utils import get_route_path  # as the router sees a path: without --root-path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from merging import LoramixError
from server.caller import Caller, caller_of, set_caller
from server.errors import ForbiddenError, UnauthorizedError
from server.gateway import GENERATING, READING
from server.keys import Keys
from server.reply import reply_of

OPEN = frozenset({"/health", "/ping", "/ready"})
CLIENT = (
    "/v1", "/v2", "/cohere", "/inference/v1/generate", "/generative_scoring", "/invocations", "/tokenize", "/detokenize",
    "/tokenizer_info", "/version", "/metrics",
)  # fmt: skip
ADMIN = ("/v1/lora",)
CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")  # the last is SageMaker's name for both
# Where a recipe is checked against its caller. Elsewhere vLLM may take the engine's name of what another has made resident, and
# its metrics name what is running.
CHECKED = GENERATING | READING | {"/v1/models"}


class Access:
    """ASGI middleware around the gateway; finds the Keys in `app.state.loramix_keys`, and leaves the caller in the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                set_caller(scope, _admit(scope, scope["app"].state.loramix_keys))
            except LoramixError as error:
                await reply_of(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _admit(scope: Scope, keys: Keys) -> Caller:
    """Whose request this is.

    Raises:
        UnauthorizedError: it has no key of this server.
        ForbiddenError: its key does not open this route.
    """
    path = get_route_path(scope)
    if _below(path, *CLOSED):
        raise ForbiddenError(
            "adapters are not loaded this way here: requests name them, and admins add them (POST /v1/lora/adapters)"
        )
    if path in OPEN:
        return caller_of(scope)
    caller = _holder(scope, keys) if keys else caller_of(scope)
    for_clients = not _below(path, *ADMIN) and (_below(path, *CLIENT) or not keys)
    if not for_clients and not keys.has_admin:
        raise ForbiddenError(
            f"{path} is off: start the server with an admin key (LORAMIX_ADMIN_KEY, or admin = true in --keys-file)"
        )
    if not for_clients and not caller.admin:
        raise ForbiddenError(f"{path} needs an admin key")
    if caller.restricted and path not in CHECKED:
        raise ForbiddenError(f"{path} does not check adapters, and this key is limited to some; ask with another key")
    return caller


def _holder(scope: Scope, keys: Keys) -> Caller:
    headers = Headers(scope=scope)
    words = [value.split() for value in headers.getlist("authorization")]
    given = {pair[1] for pair in words if len(pair) == 2 and pair[0].lower() == "bearer"}
    given |= {value.strip() for value in headers.getlist("x-api-key")} - {""}  # as clients of /v1/messages send it
    if len(given) != 1:
        raise UnauthorizedError("this server wants one key; send it as Authorization: Bearer KEY, or as x-api-key: KEY")
    caller = keys.find(given.pop().encode("latin-1"))
    if caller is None:
        raise UnauthorizedError("this server does not know the key that was sent")
    return caller


def _below(path: str, *parents: str) -> bool:
    return any(path == parent or path.startswith(f"{parent}/") for parent in parents)
