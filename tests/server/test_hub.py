"""Adapters from the Hub, fetched while the server runs: from a Hub on this machine, by a server in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from admin_harness import Site, refused
from fake_hub import FakeHub
from harness import tiny_adapter

from merging import save_adapter

REPO = "org/math-lora"

# What is asked of a server, one request a line: [method, path, body]; and what it answers, one line each.
SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from admin_harness import Site

async def main():
    root, allowed, requests = sys.argv[1:]
    async with Site(Path(root), hub_allow=json.loads(allowed)) as site:
        for method, path, body in json.loads(requests):
            reply = await site.client.request(method, path, json=body)
            print(json.dumps([reply.status_code, reply.json() if reply.content else None]))

asyncio.run(main())
"""


@pytest.fixture
def repository(tmp_path: Path) -> list[Path]:
    """Two commits."""
    folders = [tmp_path / "hub" / str(number) for number in (1, 2)]
    for seed, folder in enumerate(folders):
        save_adapter(tiny_adapter(4, 20 + seed), folder)
        (folder / "README.md").write_text("not to be fetched")
    return folders


def asked(hub: FakeHub | None, root: Path, allow: list[str], *requests: tuple[str, str, Any]) -> list[tuple[int, Any]]:
    """What a server of its own process answers, which knows the Hub by HF_ENDPOINT, or is offline."""
    environment = {**os.environ, "HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1" if hub is None else "0"}
    if hub is not None:
        environment["HF_ENDPOINT"] = hub.url
    tests = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, str(root), json.dumps(allow), json.dumps(requests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def add(repo: str, **more: str) -> tuple[str, str, Any]:
    return ("POST", "/v1/lora/adapters", {"name": "hub", "repo": repo, **more})


def test_an_allowed_repository_is_fetched_checked_used_and_there_after_a_restart_without_the_hub(
    tmp_path: Path, repository: list[Path]
) -> None:
    use = ("POST", "/v1/completions", {"model": "hub"})
    with FakeHub({REPO: repository}) as hub:
        old, new = hub.commit(REPO, 0), hub.commit(REPO, 1)
        first, answer, again, back, unknown = asked(
            hub, tmp_path, ["org/*"], add(REPO), use, add(REPO), add(REPO, revision=old), add(REPO, revision="v9")
        )
        assert not any("README" in path for path in hub.asked)
    status, card = first
    assert (status, card["outcome"], card["repo"], card["revision"]) == (201, "added", REPO, new)
    assert answer[1]["model"].startswith("hub@")
    assert (again[0], again[1]["outcome"]) == (200, "unchanged")
    assert (back[1]["outcome"], back[1]["revision"]) == ("replaced", old)
    assert unknown[0] == 400
    assert "the Hub did not give org/math-lora" in unknown[1]["error"]["message"]
    listed, answer, offline = asked(None, tmp_path, ["org/*"], ("GET", "/v1/lora/adapters", None), use, add(REPO, revision=old))
    assert {card["name"]: card["revision"] for card in listed[1]["data"]}["hub"] == old
    assert (answer[0], offline[0]) == (200, 200)
    (listed,) = asked(None, tmp_path, ["elsewhere/*"], ("GET", "/v1/lora/adapters", None))
    assert "--hub-allow" in listed[1]["skipped"][0]["reason"]


@pytest.mark.parametrize("allow", [[], ["org/other"], ["other/*"], ["ORG/*"]])
async def test_what_is_not_allowed_is_not_asked_for(tmp_path: Path, allow: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.allowed.hub_folder", lambda *args, **how: pytest.fail("it asked"))
    async with Site(tmp_path, hub_allow=allow) as site:
        refused(await site.post("adapters", name="hub", repo=REPO), 403, "--hub-allow")


def test_a_hub_without_it_a_repository_without_an_adapter_and_no_hub_are_told_in_one_line(
    tmp_path: Path, repository: list[Path]
) -> None:
    for file in repository[1].iterdir():
        file.unlink()
    (repository[1] / "README.md").write_text("no adapter")
    with FakeHub({REPO: repository}) as hub:
        replies = asked(hub, tmp_path, ["*"], add("org/none"), add(REPO), add("org/.."))
    replies += asked(None, tmp_path, ["*"], add("org/none"))
    assert [status for status, _ in replies] == [400] * 4
    messages = [reply["error"]["message"] for _, reply in replies]
    assert "org/math-lora on the Hub has no adapter_config.json" in messages[1]
    assert "should match pattern" in messages[2]
    assert all("the Hub did not give org/none" in messages[number] for number in (0, 3))
    assert not any("\n" in message for message in messages)
