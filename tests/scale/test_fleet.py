"""Through Ray: equal requests meet one replica, spill over, survive the loss of a replica and a new version, and stream."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from replicas_harness import URL, Deploy

from server.scale.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of itself

CONFIG = Path(__file__).parents[2] / "deploy" / "ray" / "config.yaml"
COMPLETIONS = "/v1/completions"
LONG = 300  # pieces: three seconds


@pytest.fixture(scope="module", autouse=True)
def two(deploy: Deploy) -> None:
    deploy(2, "--max-num-seqs", "8")


def body(model: str, pieces: int = 1, **fields: object) -> dict[str, object]:
    return {"model": model, "prompt": "Once", "max_tokens": pieces, **fields}


def replica_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.headers["x-loramix-replica"]


def ask(client: httpx.Client, model: str, pieces: int = 1) -> httpx.Response:
    return client.post(COMPLETIONS, json=body(model, pieces))


@contextmanager
def streaming(client: httpx.Client, model: str, pieces: int) -> Iterator[tuple[str, Iterator[str]]]:
    """The replica and the lines of a stream that has begun."""
    with client.stream("POST", COMPLETIONS, json=body(model, pieces, stream=True)) as reply:
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        yield replica_of(reply), lines


def two_models(client: httpx.Client) -> dict[str, str]:
    """A model of each replica, by replica."""
    found: dict[str, str] = {}
    for number in range(200):
        found.setdefault(replica_of(ask(client, f"of{number}")), f"of{number}")
        if len(found) == 2:
            return found
    raise AssertionError("one replica has all of two hundred models")


def wait_for_two(client: httpx.Client, base: str = "base") -> None:
    deadline = time.monotonic() + 60
    while len({replica_of(ask(client, base, 0)) for _ in range(20)}) < 2:
        assert time.monotonic() < deadline, "no second replica"


def test_equal_meaning_meets_one_replica_and_is_merged_once(client: httpx.Client) -> None:
    for number in range(8):
        same = [f"cat(x{number}*0.5+y)", f"y+x{number}*0.50001", f" cat( y + x{number}*.5 )"]
        assert len({replica_of(ask(client, model)) for model in same}) == 1
    replies = [ask(client, "ties-0.3(a+b)") for _ in range(5)]
    assert [reply.headers["x-loramix-cache"] for reply in replies] == ["merged", *["device"] * 4]


def test_different_meanings_and_the_base_model_go_to_every_replica(client: httpx.Client) -> None:
    assert len({replica_of(ask(client, f"m{number}")) for number in range(40)}) == 2
    assert min(Counter(replica_of(ask(client, "base")) for _ in range(40)).values()) >= 5


def test_a_stream_comes_piece_by_piece(client: httpx.Client) -> None:
    with streaming(client, "s", 100) as (_, lines):
        begun = time.monotonic()
        assert next(lines).startswith("data: ")
        early = time.monotonic() - begun
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert len(rest) == 99
        assert early < (time.monotonic() - begun) / 2


def test_what_a_replica_is_full_of_spills_over_to_the_other_which_reads_it_from_disk(client: httpx.Client) -> None:
    with ExitStack() as stack:
        met = [stack.enter_context(streaming(client, "hot", LONG))[0] for _ in range(8)]
        assert len(set(met)) == 1
        reply = ask(client, "hot")
        assert replica_of(reply) != met[0]
        assert reply.headers["x-loramix-cache"] == "disk"


def wait_for_no_lease(address: str) -> None:
    deadline = time.monotonic() + 10
    while httpx.get(f"{address}/leases").text != "0":
        assert time.monotonic() < deadline, "it goes on"


def test_a_client_that_leaves_ends_its_lease(client: httpx.Client) -> None:
    address = ask(client, "left").headers["x-fake-url"]
    with streaming(client, "left", 100 * LONG):
        assert httpx.get(f"{address}/leases").text == "1"
    wait_for_no_lease(address)


def test_so_does_one_that_leaves_before_its_answer_has_begun(client: httpx.Client) -> None:
    address = ask(client, "left").headers["x-fake-url"]
    with ThreadPoolExecutor() as pool:
        leaving = pool.submit(httpx.post, URL + COMPLETIONS, json=body("left", 100 * LONG), timeout=2)
        while httpx.get(f"{address}/leases").text == "0":
            time.sleep(0.05)
        assert isinstance(leaving.exception(), httpx.ReadTimeout)
    wait_for_no_lease(address)


def test_headers_query_and_address_reach_the_replica(client: httpx.Client) -> None:
    headers = {"Authorization": "Bearer key", "X-Request-Id": "mine", "X-Forwarded-For": "203.0.113.7"}
    reply = client.get("/echo?a=%20b&c=1", headers=headers)
    seen = dict(reply.json()["headers"])
    assert reply.json()["query"] == "a=%20b&c=1"
    assert seen["authorization"] == "Bearer key"
    assert seen["x-request-id"] == reply.headers["x-request-id"] == "mine"
    assert reply.json()["client"] == "203.0.113.7"  # which Ray's proxy believes of a proxy on its own machine
    assert all(len(reply.headers.get_list(name)) == 1 for name in ("server", "date", "x-request-id"))
    made = client.get("/echo")
    assert made.headers["x-request-id"] == dict(made.json()["headers"])["x-request-id"]


def test_a_body_that_is_too_large_is_refused_before_any_replica_sees_it(client: httpx.Client) -> None:
    reply = client.post(COMPLETIONS, json=body("x" * 200_000))
    assert reply.status_code == 413
    assert "x-loramix-replica" not in reply.headers


def test_metrics_are_those_of_every_replica(client: httpx.Client) -> None:
    with streaming(client, "counted", LONG) as (replica, _):
        page = client.get("/metrics").raise_for_status().text
    other = next(name for name in two_models(client) if name != replica)
    assert page.count("# TYPE fake_leases gauge") == 1
    assert f'fake_leases{{kind="x",replica="{replica}"}} 1.0' in page
    assert f'fake_leases{{kind="x",replica="{other}"}} 0.0' in page
    refused = client.get("/metrics", headers={"Authorization": "Bearer unknown"})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")


def test_a_replica_that_is_killed_fails_its_own_streams_alone(client: httpx.Client) -> None:
    doomed, other = two_models(client).values()
    process = int(ask(client, doomed).headers["x-fake-pid"])
    with ExitStack() as stack:
        losing = [stack.enter_context(streaming(client, doomed, 10 * LONG))[1] for _ in range(3)]
        _, going_on = stack.enter_context(streaming(client, other, LONG))
        waiting = ThreadPoolExecutor()
        unbegun = waiting.submit(ask, client, doomed, 100)  # not streamed: nothing of it has been answered
        time.sleep(0.3)
        os.kill(process, signal.SIGKILL)
        for lines in losing:
            *_, event, last = lines
            assert event == "event: error"
            assert '"code": 503' in last
            assert "[DONE]" not in last
        again = unbegun.result()
        assert again.headers["x-loramix-cache"] == "disk"
        assert replica_of(again) == replica_of(ask(client, other))
        assert list(going_on)[-1] == "data: [DONE]"
    wait_for_two(client)


@contextmanager
def traffic(count: int) -> Iterator[Counter[str]]:
    """Clients that stream without a pause, each something of its own, until the block ends: every stream comes whole.

    Inside, how many streams each replica has answered so far.
    """
    stop, met = threading.Event(), Counter[str]()

    def ask_on(number: int) -> None:
        with httpx.Client(base_url=URL, timeout=60) as mine:
            while not stop.is_set():
                with streaming(mine, f"t{number}", 20) as (replica, lines):
                    assert list(lines)[-1] == "data: [DONE]"
                met[replica] += 1

    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(ask_on, number) for number in range(count)]
        try:
            yield met
        finally:
            stop.set()
        for client in clients:
            client.result()


def test_a_new_version_loses_no_request(client: httpx.Client, deploy: Deploy) -> None:
    wait_for_two(client)
    before = {replica_of(ask(client, "base")) for _ in range(20)}
    with traffic(4) as met:
        deploy(2, "--max-num-seqs", "9")
    wait_for_two(client)
    after = {replica_of(ask(client, "base")) for _ in range(20)}
    assert not before & after
    assert met.keys() & before


def deploy_file(folder: Path, **replica: object) -> None:
    """Deploy the file for clusters with fakes, in `folder`; with other options of the replicas, if there are any."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    file = yaml.safe_load(CONFIG.read_text())
    (application,) = file["applications"]
    assert application["import_path"] == "server.scale.application:application"
    Plan.read(application["args"]["serve"])
    application["import_path"] = "replicas_harness:fake_application"
    application["args"]["serve"][0] = str(folder)
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    application["deployments"][0]["ray_actor_options"]["num_gpus"] = 0
    application["deployments"][0] |= replica
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(file), _blocking=True)


def test_the_file_for_clusters_is_deployed_as_it_stands(client: httpx.Client, tmp_path: Path) -> None:
    deploy_file(tmp_path)
    wait_for_two(client, base=str(tmp_path))  # there is no other name
    assert len({replica_of(ask(client, model)) for model in ("a+b", "b+a", "cat(b+a)")}) == 1


def wait_for(replicas: int) -> None:
    """Until so many run, and none is on its way in or out."""
    from ray import serve

    deadline = time.monotonic() + 120
    states: dict[str, int] = {}
    while states != {"RUNNING": replicas}:
        assert time.monotonic() < deadline, states
        time.sleep(0.5)
        states = {
            str(state): n for state, n in serve.status().applications["loramix"].deployments["replica"].replica_states.items()
        }


def test_more_traffic_brings_replicas_and_less_takes_them_away_and_no_request_is_lost(tmp_path: Path) -> None:
    sizes = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, "upscale_delay_s": 0.5, "downscale_delay_s": 1}
    deploy_file(tmp_path, autoscaling_config=sizes)
    wait_for(1)
    with traffic(2) as met:
        with traffic(10) as more:
            wait_for(2)
            while len(more) < 2:  # the new one answers, too
                time.sleep(0.1)
        wait_for(1)
        met.clear()
        while not met:
            time.sleep(0.1)
