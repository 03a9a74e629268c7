"""Where the tests of replicas find them."""

from collections.abc import Callable
from pathlib import Path

FAKE = Path(__file__).parent / "fake_loramix.py"
PORT = 8765
URL = f"http://127.0.0.1:{PORT}"

Deploy = Callable[..., None]
"""Deploys so many replicas with further options, in the place of those before."""
