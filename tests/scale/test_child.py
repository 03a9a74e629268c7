"""A server and the process that started it end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
FAKE = ROOT / "tests" / "fake_loramix.py"
ACTOR = f"""
import sys, threading
from server.scale.child import Child
Child.command = ({sys.executable!r}, {str(FAKE)!r})
child = Child([sys.argv[1]], "127.0.0.1")
child.__enter__()
threading.Thread(target=child.end_with_it, daemon=True).start()
print(child.url, child._process.pid, flush=True)
if sys.stdin.readline() == "stop\\n":
    child.stop()
"""


@pytest.fixture
def actor(tmp_path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ACTOR, str(tmp_path)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(actor: subprocess.Popen[str]) -> tuple[str, int]:
    assert actor.stdout is not None
    url, process = actor.stdout.readline().split()
    assert httpx.get(f"{url}/health").status_code == 200
    return url, int(process)


def wait_for_silence(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(f"{url}/health")
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            pass  # it is ending
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.1)


def test_a_killed_actor_takes_its_server_with_it(actor: subprocess.Popen[str]) -> None:
    with actor:
        url, _ = said(actor)
        actor.kill()
        wait_for_silence(url)


def test_a_killed_server_takes_its_actor_with_it(actor: subprocess.Popen[str]) -> None:
    with actor:
        _, process = said(actor)
        os.kill(process, signal.SIGKILL)
        assert actor.wait(20) == 1


def test_a_server_that_is_stopped_leaves_its_actor_alone(actor: subprocess.Popen[str]) -> None:
    with actor:
        url, _ = said(actor)
        actor.communicate("stop\n", timeout=30)
        assert actor.returncode == 0
        wait_for_silence(url)
