"""A server that answers as loramix does, in milliseconds and without a model: for tests of what is in front of many.

    python fake_loramix.py FOLDER … --port N

FOLDER is the disk tier that all share. A completion's text is as many pieces as `max_tokens`, one each hundredth of a second.
"""

import asyncio
import json
import os
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.scale.child import end_with_parent

SLOTS = 4
PIECE_SECONDS = 0.01


class Slots:
    """Merged adapters by name, the least recently used to leave first."""

    def __init__(self, count: int, disk: set[str]) -> None:
        self._count = count
        self._disk = disk
        self._resident: OrderedDict[str, None] = OrderedDict()

    def take(self, name: str) -> str:
        """Where it was found: `device`, `disk`, or else it is `merged`."""
        if name in self._resident:
            self._resident.move_to_end(name)
            return "device"
        if len(self._resident) == self._count:
            self._resident.popitem(last=False)
        self._resident[name] = None
        found = "disk" if name in self._disk else "merged"
        self._disk.add(name)
        return found


class Folder(set[str]):
    """A set of names that processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, name: object) -> bool:
        return (self._folder / str(name)).exists()

    def add(self, name: str) -> None:
        (self._folder / name).touch()


def app(folder: Path, url: str) -> FastAPI:
    fake = FastAPI()
    slots, leases = Slots(SLOTS, Folder(folder)), 0

    @fake.get("/health")
    def health() -> Response:
        return Response()

    @fake.get("/leases")
    def count() -> int:
        return leases

    @fake.get("/metrics")
    def metrics(request: Request) -> Response:
        if request.headers.get("authorization") == "Bearer unknown":
            return Response("not for you", 401, {"www-authenticate": "Bearer"})
        return Response(f'# HELP fake_leases Streams.\n# TYPE fake_leases gauge\nfake_leases{{kind="x"}} {leases}\n')

    @fake.get("/echo")
    def echo(request: Request) -> JSONResponse:
        seen = {"headers": request.headers.items(), "query": request.url.query, "client": request.client.host}
        return JSONResponse(seen, headers={"x-request-id": request.headers["x-request-id"]})

    @fake.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        mine = {"x-fake-pid": str(os.getpid()), "x-fake-url": url}
        headers = {"x-loramix-cache": slots.take(body["model"]), **mine}

        async def pieces() -> AsyncGenerator[bytes]:
            nonlocal leases
            leases += 1
            try:
                for number in range(body["max_tokens"]):
                    yield f"data: {json.dumps({'choices': [{'text': f' {number}', 'index': 0}]})}\n\n".encode()
                    await asyncio.sleep(PIECE_SECONDS)
                yield b"data: [DONE]\n\n"
            finally:
                leases -= 1

        if body.get("stream"):
            return StreamingResponse(pieces(), media_type="text/event-stream", headers=headers)
        text = ""
        async with aclosing(pieces()) as all_of_them:
            async for piece in all_of_them:
                if await request.is_disconnected():  # as vLLM does
                    break
                text += piece.decode()
        return JSONResponse({"choices": [{"text": text}]}, headers=headers)

    return fake


if __name__ == "__main__":
    end_with_parent()
    host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
    uvicorn.run(
        app(Path(sys.argv[1]), f"http://{host}:{port}"),
        host=host,
        port=int(port),
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
