"""Programs that tests run: those that `pip install -e '.[dev]'` brings, and Prometheus, which comes from the system."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
_FROM_SYSTEM = ("prometheus", "promtool")


def tool(name: str) -> str:
    """The path of a program. Skips the test where the system lacks Prometheus."""
    found = shutil.which(name, path=_PATH)
    if found is None and name in _FROM_SYSTEM:
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    assert found is not None, f"{name} is not installed; pip install -e '.[dev]'"
    return found


def run(*command: str | Path, **environment: str) -> str:
    """What a program prints; the test fails with it where the program does."""
    name, *arguments = map(str, command)
    done = subprocess.run(
        [tool(name), *arguments],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
