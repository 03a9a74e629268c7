"""A replica: an actor of Ray Serve with one `loramix serve` behind it, of which it tells where it is to be asked."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from functools import cached_property

import aiohttp
import ray
from ray import serve

from server.scale.child import Child
from server.scale.client import Place


class Replica:
    """The server runs in processes of its own, as it does without Ray, and bytes go past this actor.

    Args:
        words: what follows `loramix serve` on its command line.
        host: where the server listens; None for this node's address in the cluster.
    """

    child = Child

    def __init__(self, words: Sequence[str], host: str | None) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        self._server = self.child(words, host or ray.util.get_node_ip_address())
        self._place = Place(name, self._server.url)
        self._server.__enter__()  # waits; until then Ray sends nothing here
        threading.Thread(target=self._server.end_with_it, daemon=True).start()

    async def place(self) -> Place:
        return self._place

    async def hold(self) -> AsyncIterator[Place]:
        """For a request that is sent there: it counts as running here until this is cancelled."""
        yield self._place
        await asyncio.Event().wait()

    async def check_health(self) -> None:
        """Ray asks; whoever raises is replaced."""
        async with self._client.get(f"{self._server.url}/health") as reply:
            reply.raise_for_status()

    @cached_property
    def _client(self) -> aiohttp.ClientSession:
        """Made when Ray first asks, as it belongs to a running event loop."""
        return aiohttp.ClientSession()

    async def __del__(self) -> None:
        """Ray waits for this once nothing is running here any more."""
        await self._client.close()
        self._server.stop()
