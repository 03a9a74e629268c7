"""The README's server, curl call and Python call, run as they stand there (but for the port), answer what it says."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LORAMIX, ROOT, LiveServer

ANSWER = '{"answer": "lukewarm gossip"}'


def snippet(name: str) -> str:
    """The fenced block that follows `<!-- readme: NAME -->`."""
    text = (ROOT / "README.md").read_text()
    match = re.search(rf"<!-- readme: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert match is not None, f"README.md has no snippet {name}"
    return match[1]


@pytest.fixture(scope="module")
def readme_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    program, *arguments = shlex.split(snippet("serve"))
    assert program == ".venv/bin/loramix"
    assert arguments[1] == f"~/.cache/loramix/{model.name}"  # where the model is, unless XDG_CACHE_HOME says otherwise
    arguments[1], arguments[-1] = str(model), str(ROOT / arguments[-1])
    with LiveServer([LORAMIX, *arguments, "--max-model-len", "512"], tmp_path_factory.mktemp("readme") / "log") as live:
        yield live


def run(command: list[str], server: LiveServer) -> str:
    here = [word.replace("http://127.0.0.1:8000", server.url) for word in command]
    return subprocess.run(here, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_curl_call_answers(readme_server: LiveServer) -> None:
    reply = json.loads(run(["bash", "-c", snippet("curl")], readme_server))
    assert reply["choices"][0]["message"]["content"] == ANSWER


def test_the_python_call_answers(readme_server: LiveServer) -> None:
    assert run([sys.executable, "-c", snippet("python")], readme_server).strip() == ANSWER


def test_the_example_adapters_are_listed(readme_server: LiveServer) -> None:
    listed = json.loads(run(["curl", "-s", "http://127.0.0.1:8000/v1/models"], readme_server))["data"]
    assert [card["id"] for card in listed] == ["smollm2", "json", "manual", "pirate", "plural", "sum"]
