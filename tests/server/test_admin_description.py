"""/openapi.json describes the admin routes as they behave: fields, examples and errors."""

from pathlib import Path
from typing import Any

import pytest
from admin_harness import Site, refused
from fastapi import FastAPI
from pydantic import BaseModel

from server.routes.adapters import NewAdapter
from server.routes.presets import NewPreset
from server.routes.warm import Warm

BODIES: dict[str, type[BaseModel]] = {"adapters": NewAdapter, "presets": NewPreset, "warm": Warm}


@pytest.fixture
async def paths(tmp_path: Path) -> dict[str, Any]:
    async with Site(tmp_path) as site:
        app: FastAPI = site.app
        return {path: how for path, how in app.openapi()["paths"].items() if path.startswith("/v1/lora")}


def test_every_admin_route_is_described_with_its_errors(paths: dict[str, Any]) -> None:
    assert {(method, path.removeprefix("/v1/lora/")) for path, how in paths.items() for method in how} == {
        ("get", "adapters"), ("post", "adapters"), ("delete", "adapters/{name}"), ("get", "cache"), ("delete", "cache/{key}"),
        ("post", "warm"), ("get", "presets"), ("post", "presets"), ("delete", "presets/{name}"),
    }  # fmt: skip
    for how in paths.values():
        for route in how.values():
            assert route["description"]
            assert "422" not in route["responses"]  # the framework's own form of an error
            for code, reply in route["responses"].items():
                if code == "default" or int(code) >= 400:
                    assert reply["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")


async def test_what_is_given_as_an_example_is_taken(tmp_path: Path) -> None:
    async with Site(tmp_path, hub_allow=[]) as site:
        site.put("math-v2", 5)
        for path, body in BODIES.items():
            for example in body.model_json_schema()["examples"]:
                reply = await site.post(path, **example)
                if "repo" in example:
                    refused(reply, 403)
                else:
                    assert reply.status_code in (200, 201), reply.text
