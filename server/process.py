"""A server as a child process: started, waited for, asked for its metrics, stopped. For demos, benchmarks and tests."""

import contextlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from merging import LoramixError

START_SECONDS = 600
STOP_SECONDS = 60


class StartError(LoramixError):
    """The server did not come up; the message ends with what it said last."""


class ServerProcess:
    """A context manager: inside, the server answers at `url`; after it, the process is gone.

    Args:
        command: what to run; `--port` and a free port are added.
        log: file that its output goes to; None for where this process's own goes.
        environment: the whole environment of the process.
        tick: called twice a second while waiting, to show that something goes on.
        host: where it listens; `command` says so too, unless it is loopback.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path | None,
        environment: Mapping[str, str],
        tick: Callable[[], None] = lambda: None,
        host: str = "127.0.0.1",
    ) -> None:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        self.url = f"http://{host}:{port}"
        self.log = log
        self._command = [*command, "--port", str(port)]
        self._environment = dict(environment)
        self._tick = tick

    def __enter__(self) -> "ServerProcess":
        with contextlib.nullcontext() if self.log is None else self.log.open("w") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output, env=self._environment)
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                self._process.kill()
                said = f" (see {self.log}):\n{self.log.read_text()[-3000:]}" if self.log else "; its output says why"
                raise StartError(f"the server {'stopped' if code is not None else 'was not up in time'}{said}")
            self._tick()
            time.sleep(0.5)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Interrupt it, as Ctrl-C does, and return its exit code; once it is gone, only the latter."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; `stop` waits for its end."""
        self._process.send_signal(number)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples whose labels agree; 0 where there is none."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
        samples = (sample for family in families for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False
