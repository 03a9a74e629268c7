"""Clients in a process of their own, so that what the benchmark does meanwhile makes no gaps in what they see.

The process also watches itself: about every millisecond it notes by how much its event loop was late. What a client sees
can be that much too long.
"""

import asyncio
import gc
import multiprocessing
import re
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType

import httpx

from benchmarks.serving.trace import Answer, Trace
from benchmarks.serving.traffic import Request, Script
from merging import LoramixError

_FINISH_SECONDS = 120  # for what is under way when a client is told to stop
_WATCH_SECONDS = 0.001
_SAID = re.compile(rb'"completion_tokens":\s*(\d+)')  # so far, in each chunk: a chunk may bring more than one token


class TrafficError(LoramixError):
    """A server did not answer as the measurement needs it."""


class Client:
    """A client process; a context manager. Plays one set of scripts at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs,), daemon=True)
        self._process.start()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()

    def start(self, url: str, scripts: Sequence[Script]) -> None:
        """Play `scripts` against a server; returns once every script that repeats has had its first chunk or a failure."""
        self._pipe.send((url, tuple(scripts)))
        self._pipe.recv()

    def stop(self) -> Trace:
        """Cut off scripts that repeat, wait for the others to end, and return what was seen."""
        self._pipe.send("stop")
        trace: Trace = self._pipe.recv()
        return trace


def _main(pipe: Connection) -> None:
    gc.disable()  # a collection would be a gap of our own making; what is kept here is small
    while True:
        pipe.send(asyncio.run(_play(pipe, *pipe.recv())))


async def _play(pipe: Connection, url: str, scripts: tuple[Script, ...]) -> Trace:
    trace, stopped = Trace(), asyncio.Event()
    loop = asyncio.get_running_loop()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_FINISH_SECONDS, limits=limits) as client:
        watch = asyncio.create_task(_watch(trace))
        heard = [asyncio.Event() for _ in scripts]
        tasks = {
            asyncio.create_task(_act(client, script, trace, first)): script
            for script, first in zip(scripts, heard, strict=True)
        }
        await asyncio.gather(*(first.wait() for script, first in zip(scripts, heard, strict=True) if script.repeat))
        pipe.send("running")
        loop.add_reader(pipe.fileno(), stopped.set)
        await stopped.wait()
        loop.remove_reader(pipe.fileno())
        pipe.recv()
        for task, script in tasks.items():
            if script.repeat:
                task.cancel()
        await asyncio.wait(tasks, timeout=_FINISH_SECONDS)
        watch.cancel()
    return trace


async def _watch(trace: Trace) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_WATCH_SECONDS)
        trace.late.append((before, time.perf_counter() - before - _WATCH_SECONDS))


async def _act(client: httpx.AsyncClient, script: Script, trace: Trace, heard: asyncio.Event) -> None:
    await asyncio.sleep(script.start)
    while True:
        for request in script.requests:
            answer = Answer(request.label, time.perf_counter())
            trace.answers.append(answer)
            await _ask(client, request, answer, heard)
            if answer.status != 200 and script.repeat:
                await asyncio.sleep(0.1)  # a server that refuses is not to be asked in a tight loop
            await asyncio.sleep(request.pause)
        if not script.repeat:
            return


async def _ask(client: httpx.AsyncClient, request: Request, answer: Answer, heard: asyncio.Event) -> None:
    try:
        async with client.stream("POST", request.path, json=request.body) as reply:
            answer.cache = reply.headers.get("x-loramix-cache", "")
            waited = reply.headers.get("x-loramix-merge-ms")
            answer.merge_ms = None if waited is None else float(waited)
            answer.status = reply.status_code
            if reply.status_code != 200:
                answer.said = (await reply.aread()).decode(errors="replace")[:500] or "nothing"
            else:
                so_far = 0
                async for chunk in reply.aiter_raw():
                    now = time.perf_counter()
                    if (said := _SAID.findall(chunk)) and int(said[-1]) > so_far:
                        answer.ticks.append(now)
                        answer.tokens.append(int(said[-1]) - so_far)
                        so_far = int(said[-1])
                        heard.set()
        answer.done = time.perf_counter()
    except httpx.HTTPError as error:
        answer.status, answer.said = 0, repr(error)
    finally:
        heard.set()
