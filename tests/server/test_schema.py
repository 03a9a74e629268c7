"""Every route that loramix adds, and bodies that carry its recipes, asked what their schema allows and much that it does not.

Routes are found in the app's OpenAPI description by how they begin, so a new one below these is asked as well.
"""

from pathlib import Path
from typing import Literal

import pytest
import schemathesis
from access_harness import bearer
from admin_harness import Site
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from starlette.exceptions import HTTPException

from server.gateway import GENERATING, READING
from server.grammar import LoraObject, WeightedAdapter

vllm_endpoints = pytest.importorskip("server.vllm_endpoints", reason="needs vLLM")
EXAMPLES = 50  # for each route, allowed ones and others
PREFIXES = ("/ready", "/v1/models", "/v1/lora", *GENERATING, *READING)


class KnownAdapter(WeightedAdapter):
    name: Literal["math", "code", "style"]


class KnownAdapters(LoraObject):
    """Recipes that can often be merged, since names and methods exist."""

    method: Literal["cat", "svd", "lego", "ties", "iso"] | None = None
    adapters: list[KnownAdapter]  # type: ignore[assignment]


class Generation(BaseModel):
    """What loramix reads of a body, in the place of vLLM's."""

    model: Literal["tiny", "math", "cat(math*0.5+code)", "tutor"] | str | None = None
    lora: KnownAdapters | LoraObject | None = None
    background: bool | None = None


def make_app() -> FastAPI:
    """All that the plugin attaches, around handlers that stand for vLLM's."""
    app = FastAPI()

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 400)
        content = {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": status}}
        return JSONResponse(content, status)

    async def answer(body: Generation) -> dict[str, str | None]:
        return {"model": body.model}

    for path in sorted(GENERATING | READING):
        app.post(path, operation_id=path)(answer)
    vllm_endpoints.LoramixPlugin().attach_router(app)
    return app


APP = make_app()
DESCRIBED = schemathesis.openapi.from_dict(APP.openapi())
DESCRIBED.app = APP
OPERATIONS = {operation.label: operation for operation in (found.ok() for found in DESCRIBED.get_all_operations())}

ASKED = [
    (label, mode)
    for label, operation in OPERATIONS.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.body  # a name in a path is checked by its route's own tests
]


@pytest.fixture
def _serving(tmp_path: Path) -> None:
    """The app answers as a server that is started over a folder of three adapters, with keys and a preset."""
    site = Site(tmp_path, presets={"tutor": "lego-4(math+code)"})
    for name in ("loramix", "loramix_admin", "loramix_keys", "loramix_started", "loramix_max_model_len"):
        setattr(APP.state, name, getattr(site.app.state, name))


def test_no_route_is_left_out() -> None:
    known = {"GET /ready", "GET /v1/models", "POST /v1/chat/completions", "POST /v1/lora/adapters"}
    assert known <= OPERATIONS.keys()
    assert [label for label in OPERATIONS if not label.split()[1].startswith(PREFIXES)] == []


@pytest.mark.usefixtures("_serving")
@pytest.mark.parametrize(("label", "mode"), ASKED)
def test_whatever_is_asked_is_answered_as_described_and_errors_have_openais_form(label: str, mode: GenerationMode) -> None:
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case: Case) -> None:
        for name in ("boss", "some"):
            reply = case.call(headers=bearer(name))
            case.validate_response(reply, checks=[not_a_server_error, response_schema_conformance])
            if reply.status_code >= 400:
                error = reply.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert error["code"] == reply.status_code
                assert error["message"]

    ask()
