"""The `loramix serve` of a replica: a process that ends with the actor that started it, and never leaves a GPU taken.

`python -m server.scale.child serve MODEL …` is `loramix serve MODEL …` that is told to stop (SIGTERM) when its parent is gone.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from server.process import ServerProcess

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child(ServerProcess):
    """The server of this actor, which ends when that does, and the other way round.

    Start it in a thread that lives as long as the actor: the kernel means the thread when it says parent.
    """

    command = (sys.executable, "-m", "server.scale.child", "serve")

    def __init__(self, words: Sequence[str], host: str) -> None:
        environment = dict(os.environ)
        environment.pop("OMP_NUM_THREADS", None)  # Ray sets it for Python code that runs in the actor itself
        super().__init__([*self.command, *words, "--host", host], None, environment, host=host)
        self._stopping = False

    def end_with_it(self) -> None:
        """Wait for its end; then take this process away as well, so that Ray's router asks no more of it."""
        self._process.wait()
        if not self._stopping:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its engine, which would keep the GPU
            os._exit(1)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ray's processes block SIGINT, and so do their children."""
        self._stopping = True
        return super().stop(number)


def end_with_parent() -> None:
    """Have this process be told to stop when its parent is gone, and be the first of a group, which can be killed with it."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    from server.cli import main

    end_with_parent()
    main()
