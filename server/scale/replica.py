"""A replica: an actor of Ray Serve with one `loramix serve` behind it, to which it passes what it is asked."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from functools import cached_property

import aiohttp
from ray import serve
from yarl import URL

from server.scale.child import Child
from server.scale.front import Asked, Head, passed_on

_WRITTEN_ANEW = frozenset({b"content-length", b"host"})  # of a request
_PROXYS_OWN = frozenset({b"date", b"server", b"x-request-id"})  # of an answer: Ray's proxy adds its own, the id being the same
_END_SECONDS = 1.0


class Replica:
    """The server runs in processes of its own, as it does without Ray.

    Args:
        words: what follows `loramix serve` on its command line.
    """

    child = Child

    def __init__(self, words: Sequence[str]) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._server = self.child(words)
        self._server.__enter__()  # waits; until then Ray sends nothing here
        threading.Thread(target=self._server.end_with_it, daemon=True).start()

    @cached_property
    def _client(self) -> aiohttp.ClientSession:
        """Made at the first request, as it belongs to a running event loop."""
        return aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
        )

    async def forward(self, asked: Asked) -> AsyncIterator[Head | bytes]:
        """The server's answer, piece by piece as it comes.

        Raises:
            aiohttp.ClientError: the server cannot be reached, or has ended in the middle.
        """
        headers = [(name.decode(), value.decode("latin-1")) for name, value in asked.headers if name not in _WRITTEN_ANEW]
        url = URL(self._server.url + asked.target, encoded=True)
        try:
            request = self._client.request(asked.method, url, headers=headers, data=asked.body, allow_redirects=False)
            async with request as reply:
                raw = [pair for pair in passed_on(reply.raw_headers) if pair[0] not in _PROXYS_OWN]
                yield Head(reply.status, [*raw, (b"x-loramix-replica", self._name.encode())])
                async for piece in reply.content.iter_any():
                    yield piece
        except aiohttp.ClientError:
            # If its server has ended, so does this actor in the meantime, and whoever asks again is sent to another.
            await asyncio.sleep(_END_SECONDS)
            raise

    async def whole(self, asked: Asked) -> tuple[str, Head, bytes]:
        """This replica's name, and the server's answer at once."""
        head, *pieces = [piece async for piece in self.forward(asked)]
        assert isinstance(head, Head), "an answer begins with its head"
        return self._name, head, b"".join(piece for piece in pieces if isinstance(piece, bytes))

    async def check_health(self) -> None:
        """Ray asks; whoever raises is replaced."""
        async with self._client.get(f"{self._server.url}/health") as reply:
            reply.raise_for_status()

    async def __del__(self) -> None:
        """Ray waits for this once nothing is running here any more."""
        await self._client.close()
        self._server.stop()
