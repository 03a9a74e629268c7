"""The body of a request, no more of it than the server reads."""

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from server.errors import TooLargeError


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None where the client left. Raises TooLargeError once it is known to be over `limit` bytes."""
    announced = Headers(scope=scope).get("content-length", "")
    body, more = bytearray(), True
    too_large = announced.isdecimal() and int(announced[:18]) > limit  # 18 digits are over any limit
    while more and not too_large:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        too_large = len(body) > limit
    if too_large:
        raise TooLargeError(f"the body is over {limit / 2**20:g} MiB; send less, or raise this server's --max-body-mib")
    return bytes(body)
