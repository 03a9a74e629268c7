"""Every route that loramix adds, and the body that carries its recipes, asked whatever its schema allows and much that it does not.

Routes are found in /openapi.json by their beginning, so a new one below these is asked as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from access_harness import ADMIN, FILE, bearer
from fastapi import FastAPI
from harness import Harness
from hypothesis import HealthCheck, settings
from pydantic import BaseModel
from schemathesis.checks import load_all_checks

from server.gateway import GENERATING, READING
from server.grammar import LoraObject, parse_expression
from server.keys import Keys
from server.service import Service

vllm_endpoints = pytest.importorskip("server.vllm_endpoints", reason="needs vLLM")
PREFIXES = ("/ready", "/v1/models", "/v1/lora", *GENERATING, *READING)
load_all_checks()


class Generation(BaseModel):
    """What loramix reads of a body, in the place of vLLM's."""

    model: str | None = None
    lora: LoraObject | None = None
    background: bool | None = None


def app_of(harness: Harness, keys: Keys) -> FastAPI:
    """All that the plugin attaches, around handlers that stand for vLLM's."""
    app = FastAPI()

    async def answer(body: Generation) -> dict[str, str | None]:
        return {"model": body.model}

    for path in sorted(GENERATING | READING):
        app.post(path, operation_id=path)(answer)
    vllm_endpoints.LoramixPlugin().attach_router(app)
    presets = {"tutor": parse_expression("lego-4(math+code)", "cat")}
    app.state.loramix = Service(("tiny",), harness.catalog, presets, harness.composer, "cat")
    app.state.loramix_keys = keys
    app.state.loramix_started, app.state.loramix_max_model_len = 0, 512
    return app


@pytest.fixture
def app(make_harness: Callable[..., Harness], tmp_path: Path) -> FastAPI:
    file = tmp_path / "keys.toml"
    file.write_text(FILE + ADMIN)
    file.chmod(0o600)
    return app_of(make_harness(), Keys(file))


@pytest.fixture
def described(app: FastAPI) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=bearer("boss"))


def test_no_route_is_left_out(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    assert {"/ready", "/v1/models", "/v1/chat/completions"} <= paths.keys()
    assert [path for path in paths if not path.startswith(PREFIXES)] == []


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_is_answered_as_described_and_errors_have_openais_form(case: Any) -> None:
    for name in ("boss", "some"):
        reply = case.call(headers=bearer(name))
        checks = schemathesis.checks.CHECKS.get_by_names(["not_a_server_error", "response_schema_conformance"])
        case.validate_response(reply, checks=checks)
        if reply.status_code >= 400 and reply.status_code not in (405, 422):  # these are vLLM's to answer
            error = reply.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == reply.status_code
            assert error["message"]
