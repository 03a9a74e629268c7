"""`loramix serve --replicas`, as far as it goes without a server."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.errors import ConfigError
from server.scale import local


def test_without_ray_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'loramix\[scale\]'"):
        local.run(["MODEL", "--port", "0"], 2)


def test_a_port_that_is_taken_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        local.run(["MODEL", "--port", str(taken.getsockname()[1])], 2)


def test_the_command_hands_over_what_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[tuple[Sequence[str], int]] = []
    monkeypatch.setattr(local, "run", lambda words, replicas: given.append((words, replicas)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapters").mkdir()
    words = [str(tmp_path), "--adapters", str(tmp_path / "adapters"), "--max-loras", "4", "--replicas", "3", "--port", "9000"]
    result = CliRunner().invoke(app, ["serve", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert given == [([*words[:3], "--max-loras", "4", "--port", "9000"], 3)]
