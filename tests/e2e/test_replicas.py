"""Two real servers behind one address: `loramix serve --replicas 2`, one folder of merged adapters, one of them killed."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest
from live import LiveServer, serve_command

# Two servers and Ray on a few cores: minutes.
pytestmark = [pytest.mark.long, pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `scale`")]

COMPLETIONS = "/v1/completions"
KEY = "the-key-of-an-admin"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Two pairs of adapters in turn, where memory is for one (see test_disk.py): there the disk is quicker than a merge.
OPTIONS = ["--adapter-host-gib", "0.0105", "--max-loras", "4", "--max-num-seqs", "2", "--enforce-eager"]


@pytest.fixture(scope="module")
def fleet(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("fleet")
    options = ["--adapters", str(adapters), "--cache-dir", str(folder / "cache"), "--preset", "blend=svd-8(all*0.5+twin)"]
    options += ["--state-dir", str(folder / "state"), *OPTIONS, "--replicas", "2"]
    with LiveServer(serve_command(model, *options), folder / "log", {"LORAMIX_ADMIN_KEY": KEY}) as live:
        yield live


def body(model: str, tokens: int, **fields: object) -> dict[str, object]:
    return {"model": model, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, **fields}


def ask(fleet: LiveServer, model: str, tokens: int = 1, **fields: object) -> httpx.Response:
    reply = httpx.post(fleet.url + COMPLETIONS, json=body(model, tokens, **fields), headers=HEADERS, timeout=120)
    return reply.raise_for_status()


def replica_of(reply: httpx.Response) -> str:
    return reply.headers["x-loramix-replica"]


def servers(fleet: LiveServer) -> dict[str, psutil.Process]:
    """The replicas' own servers by URL."""
    found = {}
    for process in psutil.Process(fleet._process.pid).children(recursive=True):
        words = process.cmdline()
        if "server.scale.child" in words:
            found[f"http://127.0.0.1:{words[words.index('--port') + 1]}"] = process
    return found


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", headers=HEADERS).raise_for_status().text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def wait_for_two(fleet: LiveServer) -> None:
    """Until both answer: the first to be up is asked alone, and shares its sessions once the other is."""
    deadline = time.monotonic() + 300
    while len(servers(fleet)) < 2 or len({replica_of(ask(fleet, "smollm2")) for _ in range(8)}) < 2:
        assert time.monotonic() < deadline, "there is one replica alone"
        time.sleep(1)


def test_what_one_merged_the_other_reads_and_a_killed_one_loses_its_own_streams_alone(fleet: LiveServer) -> None:
    wait_for_two(fleet)
    same = ["svd-8(all*0.5+twin)", "svd-8(twin+all*0.50)", "blend", "svd-8(all*.5+twin)"]
    replies = [ask(fleet, model) for model in same]
    assert [reply.headers["x-loramix-cache"] for reply in replies] == ["merged", "device", "device", "device"]
    assert len({replica_of(reply) for reply in replies}) == 1
    assert len({reply.headers["x-loramix-key"] for reply in replies}) == 1
    deadline = time.monotonic() + 60
    while not sum(metric(url, 'loramix_disk_writes_total{outcome="written"') for url in servers(fleet)):
        assert time.monotonic() < deadline, "it was not written"
        time.sleep(0.2)

    reply = httpx.post(f"{fleet.url}/v1/lora/presets", json={"name": "added", "recipe": "attn+mlp"}, headers=HEADERS)
    assert reply.status_code == 201, reply.text
    for url in servers(fleet):
        while "added" not in httpx.get(f"{url}/v1/models", headers=HEADERS).text:
            assert time.monotonic() < deadline, "one replica does not know what was added at another"
            time.sleep(0.2)
    page = httpx.get(f"{fleet.url}/metrics", headers=HEADERS, timeout=30).raise_for_status().text
    assert len(set(re.findall(r'^loramix_leases{replica="(.+)"}', page, re.MULTILINE))) == 2
    assert httpx.get(f"{fleet.url}/metrics").status_code == 401

    with ExitStack() as stack:  # its replica is full: two streams are all that it runs
        streams = [
            stack.enter_context(
                httpx.stream(
                    "POST", fleet.url + COMPLETIONS, json=body("blend", 400, stream=True), headers=HEADERS, timeout=120
                )
            )
            for _ in range(2)
        ]
        lines = [(line for line in stream.iter_lines() if line) for stream in streams]
        assert all(next(each).startswith("data: ") for each in lines)
        assert {replica_of(stream) for stream in streams} == {replica_of(replies[0])}
        spilt = ask(fleet, "blend", tokens=8)
        assert replica_of(spilt) != replica_of(replies[0])
        assert spilt.headers["x-loramix-cache"] == "disk"
        assert spilt.headers["x-loramix-key"] == replies[0].headers["x-loramix-key"]

        (doomed,) = [process for url, process in servers(fleet).items() if metric(url, "loramix_leases ") == 2]
        engine = doomed.children(recursive=True)
        os.kill(doomed.pid, signal.SIGKILL)
        for each in lines:
            *before, event, last = each
            assert all(line.startswith("data: ") for line in before)
            assert event == "event: error"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
    assert ask(fleet, "blend", tokens=8).json()["choices"] == spilt.json()["choices"]
    assert not psutil.wait_procs(engine, timeout=20)[1], "its engine would keep the GPU"

    wait_for_two(fleet)  # Ray starts another
    family = psutil.Process(fleet._process.pid).children(recursive=True)
    assert fleet.stop() == 0
    assert not [process for process in psutil.wait_procs(family, timeout=20)[1] if process.is_running()]
