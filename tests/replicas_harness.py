"""Where the tests of replicas find them, and the application with tests/fake_loramix.py in the place of servers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"

Deploy = Callable[..., None]
"""Deploys so many replicas with further options, in the place of those before."""


def fake_fleet(words: list[str], replicas: int, host: str | None = "127.0.0.1") -> Any:
    """Imports Ray, which need not be there for the rest."""
    from server.scale.application import fleet
    from server.scale.child import Child
    from server.scale.plan import Plan
    from server.scale.replica import Replica

    class FakeChild(Child):
        command = (sys.executable, "-P", str(Path(__file__).parent / "fake_loramix.py"))  # -P: tests/merging is not merging

    class FakeReplica(Replica):
        child = FakeChild

    return fleet(Plan.read(words), replicas, host, FakeReplica)


def fake_application(arguments: dict[str, list[str]]) -> Any:
    """As server.scale.application:application."""
    return fake_fleet(arguments["serve"], 1, host=None)
