"""What the end-to-end tests start: `loramix serve` with the example model, on the CPU."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import torch

from server.process import ServerProcess

ROOT = Path(__file__).parents[1]
LORAMIX = str(Path(sys.executable).parent / "loramix")

# One GiB of key-value cache is plenty for a model of 135M parameters, and leaves room beside it.
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class LiveServer(ServerProcess):
    """A ServerProcess in the tests' environment."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        super().__init__(command, log, {**ENVIRONMENT, **(environment or {})})

    def processes(self) -> list[psutil.Process]:
        """The server's own process, and all that it has started."""
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def ended(self, seconds: float) -> int:
        """Its exit code, once it has ended by itself."""
        return self._process.wait(seconds)

    def is_idle(self) -> bool:
        """Whether nothing is leased, being merged, or waiting for that."""
        names = ("loramix_leases", "loramix_waiting_requests", "loramix_merge_queue_length", "vllm:num_requests_running")
        return all(self.metric(name) == 0 for name in names)

    def has_slots(self, recipes: list[str]) -> bool:
        """Whether all of `recipes` can be running at the same time."""
        before = self.metric("loramix_leases")
        with ExitStack() as stack:
            for recipe in recipes:
                body = {"model": recipe, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
                stream = stack.enter_context(httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60))
                if stream.status_code != 200:
                    return False
            return self.metric("loramix_leases") == before + len(recipes)


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.2)


def example_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted if need be."""
    script = [sys.executable, ROOT / "examples" / "model.py"]
    return Path(subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def serve_command(model: Path, *options: str) -> list[str]:
    """`loramix serve` as the tests run it: short contexts, so that it starts and answers quickly; several fit on a GPU."""
    # Told how much to take for its cache, vLLM does not ask what is free, which others change meanwhile.
    share = ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(1 << 30)] if torch.cuda.is_available() else []
    return [LORAMIX, "serve", str(model), "--served-model-name", "smollm2", "--max-model-len", "512", *share, *options]


def refused(*arguments: str | Path, **environment: str) -> str:
    """What `loramix` prints on stderr as it exits with code 2."""
    command = [LORAMIX, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return " ".join(done.stderr.split())
