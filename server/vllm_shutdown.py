"""The end of vLLM's engine: where it is told to end, what is under way is finished first; where it dies, that is no success."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from vllm.engine.protocol import EngineClient


def before_shutdown(engine_client: EngineClient, drain: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> None:
    """Have `drain` run, for so long at most, before the engine is shut down.

    On SIGTERM and SIGINT vLLM shuts its engine down first, on a thread of its own; from then on no adapter can be merged.
    The engine finishes what it has for `--shutdown-timeout` seconds at most, and streams go on until then.

    Where an engine's process is killed or fails, vLLM stops serving and calls this on its own thread alone. It would end with
    exit code 0, which tells whoever restarts servers that all is well: it ends with 1 and a line that says why.
    """
    loop, own_thread, shutdown = asyncio.get_running_loop(), threading.current_thread(), engine_client.shutdown
    told_to = False

    def drained(*args: Any, **options: Any) -> None:
        nonlocal told_to
        if threading.current_thread() is not own_thread:  # there it would wait for itself: the server has ended otherwise
            told_to = True
            with contextlib.suppress(TimeoutError):  # those that still wait are told so by what fails
                asyncio.run_coroutine_threadsafe(drain(), loop).result(seconds)
        died = engine_client.errored and not told_to
        shutdown(*args, **options)
        if died:
            raise SystemExit("loramix: the engine has died, so this server ends; start it again (the log above has the cause)")

    engine_client.shutdown = drained
