"""Access: what a key opens, and what is closed to everybody."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from access_harness import ADMIN, CHAT, FILE, KEYS, bearer
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import WebSocketDenialResponse
from starlette.types import Message, Receive, Scope, Send

from server.access import Access
from server.keys import Keys

MakeClient = Callable[..., TestClient]


def test_a_server_without_keys_is_open_and_knows_its_callers_by_address(make_client: MakeClient) -> None:
    client = make_client(None)
    for headers in ({}, {"authorization": "Bearer none"}):  # OpenAI's client cannot do without a key
        reply = client.post(CHAT, json={"model": "math"}, headers=headers)
        assert (reply.status_code, reply.json()["caller"]) == (200, "testclient")
    assert client.post("/sleep").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEYS['all']}"},
        {"Authorization": f"bearer  {KEYS['all']} "},
        {"x-api-key": KEYS["all"]},
        {"X-Api-Key": KEYS["all"], "Authorization": "Basic dXNlcjpwYXNz"},
        {"x-api-key": KEYS["all"], "authorization": f"Bearer {KEYS['all']}"},
    ],
)
def test_a_key_opens_the_server_as_bearer_or_as_x_api_key(client: TestClient, headers: dict[str, str]) -> None:
    for path in (CHAT, "/v1/messages", "/tokenize", "/v1/embeddings", "/inference/v1/generate", "/metrics", "/version"):
        reply = client.post(path, json={"model": "math+code"}, headers=headers)
        assert (reply.status_code, reply.json()["caller"]) == (200, "all"), path


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "wants one key"),
        ({"authorization": KEYS["all"]}, "wants one key"),
        ({"authorization": f"Basic {KEYS['all']}"}, "wants one key"),
        ({"authorization": "Bearer"}, "wants one key"),
        ({"authorization": f"Bearer {KEYS['all']} {KEYS['all']}"}, "wants one key"),
        ({"x-api-key": KEYS["all"], "authorization": f"Bearer {KEYS['some']}"}, "wants one key"),
        ({"cookie": f"api_key={KEYS['all']}"}, "wants one key"),
        ({"authorization": "Bearer none"}, "does not know the key"),
        ({"authorization": f"Bearer {KEYS['all'][:-1]}"}, "does not know the key"),
        ({"authorization": f"Bearer {KEYS['all']}x"}, "does not know the key"),
        ({"authorization": f"Bearer {KEYS['all'].upper()}"}, "does not know the key"),
    ],
)
def test_without_a_key_of_the_servers_nothing_but_probes_is_open(
    client: TestClient, headers: dict[str, str], said: str
) -> None:
    for path in (
        CHAT,
        "/v1/models",
        "/tokenize",
        "/metrics",
        "/version",
        "/docs",
        "/v1/lora/adapters",
        "/nowhere",
        "/v1//models",
    ):
        reply = client.get(path, headers=headers)
        error = reply.json()["error"]
        assert reply.status_code == error["code"] == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
        assert error["type"] == "AuthenticationError"
        assert said in error["message"]
        assert KEYS["all"] not in reply.text
    for path in ("/health", "/ping"):
        assert client.get(path, headers=headers).status_code == 200


def test_a_key_in_the_query_opens_nothing(client: TestClient) -> None:
    for name in ("api_key", "key", "access_token", "Authorization"):
        assert client.get("/v1/models", params={name: KEYS["all"]}).status_code == 401


def test_a_key_that_leaves_the_file_opens_nothing_any_more(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys._LOOK_SECONDS", 0)
    client = make_client(FILE + ADMIN)
    assert client.get("/v1/models", headers=bearer("all")).status_code == 200
    (tmp_path / "keys.toml").write_text(ADMIN)
    assert client.get("/v1/models", headers=bearer("all")).status_code == 401
    assert client.get("/v1/models", headers=bearer("boss")).status_code == 200


def test_a_websocket_needs_a_key_too(client: TestClient) -> None:
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/v1/realtime"):
        pass
    assert denied.value.status_code == 401
    with client.websocket_connect("/v1/realtime", headers=bearer("all")) as socket:
        assert socket.receive_text() == "all"


@pytest.mark.parametrize(
    "path", ["/v1/lora/adapters", "/v1/lora", "/sleep", "/collective_rpc", "/inference/v1/abort_requests", "/docs"]
)
def test_admin_routes_open_to_admin_keys_alone(client: TestClient, path: str) -> None:
    assert client.post(path, headers=bearer("boss")).json()["caller"] == "boss"
    for name in ("all", "some"):
        reply = client.post(path, headers=bearer(name))
        assert reply.status_code == reply.json()["error"]["code"] == 403
        assert reply.json()["error"]["type"] == "PermissionDeniedError"
        assert reply.json()["error"]["message"] == f"{path} needs an admin key"


@pytest.mark.parametrize("path", ["/metricsx", "/v1x", "/tokenizers", "/somewhere", "/"])
def test_routes_that_nobody_has_named_are_for_admins(client: TestClient, path: str) -> None:
    assert client.get(path, headers=bearer("all")).status_code == 403
    assert client.get(path, headers=bearer("boss")).status_code == 404


def test_admin_routes_are_off_where_no_admin_key_is_set(make_client: MakeClient) -> None:
    for client, headers in ((make_client(None), {}), (make_client(FILE), bearer("all"))):
        reply = client.post("/v1/lora/adapters", headers=headers)
        assert reply.status_code == 403
        assert "is off: start the server with an admin key" in reply.json()["error"]["message"]
        assert client.post(CHAT, json={"model": "math"}, headers=headers).status_code == 200


def test_an_admin_key_asks_models_as_well(client: TestClient) -> None:
    assert client.post(CHAT, json={"model": "cat(math+code)"}, headers=bearer("boss")).json()["caller"] == "boss"


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/math"])
def test_nobody_loads_adapters_past_loramix(make_client: MakeClient, path: str) -> None:
    for client, headers in ((make_client(None), {}), (make_client(FILE + ADMIN), bearer("boss"))):
        for method in ("POST", "DELETE", "GET"):
            reply = client.request(method, path, headers=headers)
            assert reply.status_code == 403
            assert "POST /v1/lora/adapters" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, f"/prefix{CHAT}"])
def test_a_server_below_a_path_checks_the_same(make_client: MakeClient, path: str) -> None:
    client = make_client(FILE + ADMIN, root_path="/prefix")
    assert client.post(path, json={"model": "math"}).status_code == 401
    assert client.post(path, json={"model": "code"}, headers=bearer("some")).status_code == 404
    reply = client.post(path, json={"model": "math"}, headers=bearer("some"))
    assert "math@" in reply.json()["body"]
    assert client.post("/prefix/v1/lora/adapters", headers=bearer("some")).status_code == 403
    assert client.post("/prefix/adapters", headers=bearer("boss")).status_code == 403


def test_no_log_shows_a_key(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (*KEYS.values(), "sk-0123456789-nobody"):
            client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            client.post("/sleep", headers={"x-api-key": key})
    assert "sk-0123456789" not in caplog.text


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"x-api-key"]),
        st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda value: b"Bearer " + value)),
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def one_key(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(ADMIN)
    return Keys(path)


@given(headers=HEADERS)
def test_no_headers_of_any_kind_make_it_fail_or_open(one_key: Keys, headers: list[tuple[bytes, bytes]]) -> None:
    passed: list[Scope] = []
    sent: list[Message] = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("a request is refused before it is read")

    app = FastAPI()
    app.state.loramix_keys = one_key
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "client": None, "app": app}
    asyncio.run(Access(behind)(scope, receive, send))
    assert passed == []
    assert sent[0]["status"] == 401
