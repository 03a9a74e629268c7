"""A real Prometheus on a free port, with a configuration of the test's, to be asked for what it has scraped."""

import math
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from tools import tool


class Prometheus:
    """A context manager: inside, it scrapes and answers queries."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder, self._config = folder, config
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"

    def __enter__(self) -> "Prometheus":
        program, config = tool("prometheus"), self._folder / "prometheus.yaml"
        config.write_text(yaml.safe_dump(self._config))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}",
                   f"--web.listen-address={self._address}"]  # fmt: skip
        with (self._folder / "prometheus.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._ready():
            said = (self._folder / "prometheus.log").read_text()
            assert self._process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def has_data(self, expr: str) -> bool:
        """Whether an expression gives a number now."""
        return any(not math.isnan(float(series["value"][1])) for series in self.get("query", query=expr)["result"])

    def get(self, path: str, **parameters: str) -> Any:
        """The data of a reply of its API; fails with what it says where it refuses."""
        reply = httpx.get(f"http://{self._address}/api/v1/{path}", params=parameters, timeout=30).json()
        assert reply["status"] == "success", reply
        return reply["data"]

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://{self._address}/-/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False
