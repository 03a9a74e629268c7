"""Bodies that would trip up whoever reads or answers them: each is answered with 4xx and a JSON body, never with 500."""

import json

import httpx
import pytest
from fastapi import FastAPI
from harness import Harness

from server.catalog import Catalog
from server.gateway import Gateway
from server.service import Service

BODIES = {
    "half a character": rb'{"model": "math+\ud800"}', "half a character alone": rb'{"model": "\ud800"}',
    "half a character in an object": rb'{"lora": {"adapters": [{"name": "\ud800"}]}}',
    "half a character as a field": rb'{"lora": {"adapters": [], "\ud800": 1}}',
    "half a character as an option": rb'{"lora": {"adapters": [{"name": "math"}], "options": {"\ud800": 1}}}',
    "line breaks": rb'{"model": "math\n\r\u2028;"}', "NUL": rb'{"model": "math\u0000"}',
    "too deep": b'{"lora": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "deep": b'{"lora": ' + b"[" * 400 + b"]" * 400 + b"}",
    "a rank of 4000 digits": b'{"model": "lego-' + b"9" * 4000 + b'(math)"}',
    "a rank of 9000 digits": b'{"model": "lego-' + b"9" * 9000 + b'(math)"}',
    "a rank in an object": b'{"lora": {"adapters": [{"name": "math"}], "method": "svd", "rank": ' + b"9" * 4000 + b"}}",
    "a density of 4000 digits": b'{"lora": {"adapters": [{"name": "math"}], "method": "ties", "options": {"density": '
    + b"9" * 4000 + b"}}}",
    "a megabyte of name": b'{"model": "' + b"x" * 10**6 + b'(a)"}',
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_hostile_body_is_answered_with_the_fault_and_the_next_request_is_served(catalog: Catalog, body: bytes) -> None:
    app = FastAPI()
    app.state.loramix = Service(("tiny",), catalog, {}, Harness(catalog, 2, False, 5.0).composer, "cat")
    app.add_middleware(Gateway)

    @app.post("/v1/completions")
    async def answer() -> str:
        return "served"

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/v1/completions", content=body)
        assert 400 <= response.status_code < 500
        error = response.json()["error"]
        assert error["code"] == response.status_code
        assert len(response.content) < 2000
        served = await client.post("/v1/completions", content=json.dumps({"model": "math+code"}))
        assert served.json() == "served"
