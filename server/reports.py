"""Reports: how the workers say that a merge has ended, past the engine and its loop.

The API process listens on a socket in a private folder; each worker's helper threads send it one small JSON message a
merge, and the disk cache's figures when these change. All workers run on the API process's host.
"""

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import Callable
from threading import Lock
from typing import Any, Literal, TypedDict

import zmq
import zmq.asyncio

from server.disk_metrics import Figures


class Fault(TypedDict):
    """Why a merge failed. kind: the name of the error's class; param: the part of the recipe at fault, if one is."""

    kind: str
    message: str
    param: str | None


class Report(TypedDict):
    """The end of one merge in one worker; its slot is not written any more.

    state: `done`: the slot holds the merged adapter; `failed`: see `fault`; `dropped`: it was not wanted any more.
    seconds: by phase. tiers: how many sources were found where. used_bytes: of the adapter store's tiers now.
    disk: whether the merged adapter was found in the disk cache; None where it was not looked for.
    """

    lora_id: int
    state: Literal["done", "failed", "dropped"]
    fault: Fault | None
    seconds: dict[str, float]
    tiers: dict[str, int]
    disk: Literal["hit", "miss"] | None
    used_bytes: dict[str, int]


class Reporter:
    """The sending end, in a worker; any thread may send, and none ever waits."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(0)  # no limit, so that sending never waits
        self._socket.setsockopt(zmq.LINGER, 0)  # nor does the end of the process
        self._socket.connect(address)
        self._lock = Lock()  # a socket is for one thread at a time

    def send(self, report: Report | Figures) -> None:
        with self._lock:
            self._socket.send_json(report)

    def close(self) -> None:
        self._socket.close()


class Reports:
    """The receiving end, in the API process; to be made and used on its event loop.

    Args:
        show: called with figures as they come.

    Attributes:
        address: for each worker's Reporter.
    """

    def __init__(self, show: Callable[[Figures], None]) -> None:
        self._show = show
        self._folder = tempfile.mkdtemp(prefix="loramix-")
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self.address = f"ipc://{self._folder}/reports"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.bind(self.address)
        self._expected: dict[int, tuple[int, list[Report], asyncio.Future[list[Report]]]] = {}
        self._listener = asyncio.create_task(self._listen())

    def expect(self, lora_id: int, workers: int) -> asyncio.Future[list[Report]]:
        """The reports of a merge about to begin, once every worker has sent its own."""
        ended: asyncio.Future[list[Report]] = asyncio.get_running_loop().create_future()
        self._expected[lora_id] = (workers, [], ended)
        return ended

    def forget(self, lora_id: int) -> None:
        self._expected.pop(lora_id, None)

    def close(self) -> None:
        self._listener.cancel()
        self._socket.close(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _listen(self) -> None:
        while True:
            report: Any = await self._socket.recv_json()
            if "families" in report:
                self._show(report)
                continue
            if report["lora_id"] not in self._expected:
                continue  # of a merge that did not begin in every worker
            workers, received, ended = self._expected[report["lora_id"]]
            received.append(report)
            if len(received) == workers:
                del self._expected[report["lora_id"]]
                if not ended.done():
                    ended.set_result(received)
