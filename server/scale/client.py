"""Asking a replica's server over HTTP, byte for byte what the client asked."""

from dataclasses import dataclass
from functools import cached_property

import aiohttp
from yarl import URL

from server.scale.front import Answer, Asked, Head, passed_on

_WRITTEN_ANEW = frozenset({b"content-length", b"host"})  # of a request
_PROXYS_OWN = frozenset({b"date", b"server", b"x-request-id"})  # of an answer: Ray's proxy adds its own, the id being the same
_IDLE_SECONDS = 2.0  # less than the five after which vLLM's server hangs up, or a request might meet that


@dataclass(frozen=True)
class Place:
    """A replica's server. `name`: Ray's for the replica."""

    name: str
    url: str


class Client:
    """Connections to the servers of all replicas."""

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        """Made at the first request, as it belongs to a running event loop."""
        return aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
        )

    async def answer(self, place: Place, asked: Asked) -> Answer:
        """The server's answer, piece by piece as it comes.

        Raises:
            aiohttp.ClientError: the server cannot be reached, or has ended in the middle.
        """
        headers = [(name.decode(), value.decode("latin-1")) for name, value in asked.headers if name not in _WRITTEN_ANEW]
        url = URL(place.url + asked.target, encoded=True)
        request = self._session.request(asked.method, url, headers=headers, data=asked.body, allow_redirects=False)
        async with request as reply:
            raw = [pair for pair in passed_on(reply.raw_headers) if pair[0] not in _PROXYS_OWN]
            yield Head(reply.status, [*raw, (b"x-loramix-replica", place.name.encode())])
            async for piece in reply.content.iter_any():
                yield piece

    async def whole(self, place: Place, asked: Asked) -> tuple[Head, bytes]:
        """The same at once. Raises aiohttp.ClientError."""
        head, *pieces = [piece async for piece in self.answer(place, asked)]
        assert isinstance(head, Head), "an answer begins with its head"
        return head, b"".join(piece for piece in pieces if isinstance(piece, bytes))
