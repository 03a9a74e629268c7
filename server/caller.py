"""Who asks: the caller of a request, by the name that logs may show and fair shares go by, and what it may use."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from starlette.types import Scope

_PLACE = "loramix.caller"  # in the ASGI scope


@dataclass(frozen=True)
class Caller:
    """Whoever a key stands for; where the server has no keys, whoever is at an address.

    Attributes:
        name: never the key.
        adapters: patterns of the adapters that it may use (`math-*`; fnmatch, case counts). The base model is for everybody.
        admin: whether admin routes are open to it.
    """

    name: str
    adapters: tuple[str, ...] = ("*",)
    admin: bool = False

    @property
    def restricted(self) -> bool:
        """Whether there can be adapters that it may not use."""
        return "*" not in self.adapters

    def may_use(self, adapter: str) -> bool:
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANYONE = Caller("anyone")
"""For what is asked on nobody's behalf, such as presets at start."""


def caller_of(scope: Scope) -> Caller:
    """The caller of a request: who its key says, or else the client's address."""
    known = scope.get(_PLACE)
    if isinstance(known, Caller):
        return known
    client = scope.get("client")
    return Caller(client[0] if client else "local")  # a Unix socket has no addresses


def set_caller(scope: Scope, caller: Caller) -> None:
    """Say whose request this is; for all that is behind (see server/access.py)."""
    scope[_PLACE] = caller
