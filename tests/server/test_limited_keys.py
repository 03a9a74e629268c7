"""Keys that are limited to some adapters: what they see, and that the others might as well not be there."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from access_harness import CHAT, FILE, bearer
from fastapi.testclient import TestClient


def test_each_caller_is_listed_what_it_may_use(client: TestClient) -> None:
    def listed(name: str) -> list[str]:
        return [card["id"] for card in client.get("/v1/models", headers=bearer(name)).json()["data"]]

    assert listed("all") == listed("boss") == ["tiny", "math", "code", "style", "open", "shut"]
    assert listed("some") == ["tiny", "math", "style", "open"]
    assert listed("base") == ["tiny"]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/tokenize"])
def test_a_limited_key_uses_the_base_model_and_its_adapters(client: TestClient, path: str) -> None:
    for model in ("tiny", "math", "cat(math*0.5+style)", "open"):
        assert client.post(path, json={"model": model}, headers=bearer("some")).status_code == 200, model
    assert client.post(path, json={"model": "tiny"}, headers=bearer("base")).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [
        {"model": "code"},
        {"model": "code*0.5"},
        {"model": "cat(math+code)"},
        {"model": "linear(style+code)"},
        {"model": "cat(math+code+style)"},
        {"model": "shut"},
        {"model": "shut+math"},
        {"lora": {"adapters": [{"name": "code"}]}},
        {"model": "tiny", "lora": {"adapters": [{"name": "math"}, {"name": "code"}]}},
    ],
)
def test_what_a_key_may_not_use_is_as_what_is_not_there(
    client: TestClient, make_client: Callable[..., TestClient], path: str, body: dict[str, Any]
) -> None:
    assert client.post(path, json=body, headers=bearer("base")).status_code == 404
    hidden = client.post(path, json=body, headers=bearer("some"))
    absent = make_client(None, without="code").post(path, json=body)
    assert hidden.status_code == absent.status_code == 404
    assert hidden.text == absent.text


def test_a_name_that_was_meant_is_suggested_only_to_those_who_may_use_it(client: TestClient) -> None:
    def said(name: str, model: str) -> str:
        return str(client.post(CHAT, json={"model": model}, headers=bearer(name)).json()["error"]["message"])

    assert "did you mean 'code'" in said("all", "codes")
    assert "did you mean 'shut'" in said("all", "shutt")
    assert said("some", "codes").endswith("; known: math, open, style, tiny")
    assert said("some", "codes*2").endswith("; known: math, style")
    assert said("base", "codes*2").endswith("no adapter 'codes' here")
    assert "did you mean 'math'" in said("some", "maths")


def test_a_limited_key_does_not_reach_routes_that_do_not_check_adapters(client: TestClient) -> None:
    resident = client.post(CHAT, json={"model": "code"}, headers=bearer("all")).json()["body"]
    for path in ("/inference/v1/generate", "/invocations", "/v1/embeddings", "/metrics", "/version"):
        reply = client.post(path, content=resident, headers=bearer("some"))
        assert reply.status_code == 403
        assert "this key is limited to some" in reply.json()["error"]["message"]
    assert client.post(CHAT, content=resident, headers=bearer("some")).status_code == 400  # the engine's own name is no recipe


@pytest.mark.parametrize("addresses", [["1.1.1.1"], [f"2.2.2.{number}" for number in range(8)]], ids=["the-others", "many"])
async def test_fair_shares_count_a_limited_key_by_its_name_whatever_its_address(
    make_client: Callable[..., TestClient], addresses: list[str]
) -> None:
    app = make_client(FILE).app

    async def use(name: str, model: str, address: str) -> str:
        """Where the adapter came from."""
        transport = httpx.ASGITransport(app, client=(address, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=bearer(name)) as asking:
            return (await asking.post(CHAT, json={"model": model})).headers["x-loramix-cache"]

    assert await use("all", "code", "1.1.1.1") == "merged"
    for number in range(8):
        assert await use("some", f"math*{number + 1}e-4", addresses[number % len(addresses)]) == "merged"
    assert await use("all", "code", "1.1.1.1") == "device"  # by addresses it would have given way: there are two slots
