"""What the end-to-end tests start: `loramix serve` with the example model, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

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
