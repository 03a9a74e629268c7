"""What the tests of access share: a keys file, and loramix's middleware before handlers that stand for vLLM's."""

from typing import Any

from fastapi import FastAPI, Request, WebSocket
from harness import Harness

from server.access import Access
from server.caller import caller_of
from server.gateway import Gateway
from server.grammar import parse_expression
from server.keys import Keys
from server.routes import models
from server.service import Service

KEYS = {name: f"sk-0123456789-{name}" for name in ("all", "some", "base", "boss")}
FILE = f"""
[[key]]
name = "all"
key = "{KEYS["all"]}"
[[key]]
name = "some"
key = "{KEYS["some"]}"
adapters = ["mat*", "style"]
[[key]]
name = "base"
key = "{KEYS["base"]}"
adapters = []
"""
ADMIN = f'[[key]]\nname = "boss"\nkey = "{KEYS["boss"]}"\nadmin = true\n'
CHAT = "/v1/chat/completions"
ECHOED = (
    CHAT, "/v1/messages", "/tokenize", "/v1/lora/adapters", "/v1/lora", "/v1/embeddings", "/inference/v1/generate",
    "/inference/v1/abort_requests", "/invocations", "/health", "/ping", "/metrics", "/version", "/sleep", "/collective_rpc",
    "/docs", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/math",
)  # fmt: skip


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def app_of(harness: Harness, keys: Keys, without: str | None = None, **options: Any) -> FastAPI:
    """Access and gateway before handlers that tell what reached them, as loramix puts them before vLLM's.

    `without` leaves out an adapter, and the presets that are made of it.
    """
    app = FastAPI(docs_url=None, **options)
    if without is not None:
        del harness.catalog._entries[without]
    recipes = {"open": "math+style", "shut": "lego-4(math+code)"}
    presets = {name: parse_expression(text, "cat") for name, text in recipes.items() if without is None or without not in text}
    app.state.loramix = Service(("tiny",), harness.catalog, presets, harness.composer, "cat")
    app.state.loramix_keys = keys
    app.state.loramix_started, app.state.loramix_max_model_len = 0, 512
    app.include_router(models.router)
    app.add_middleware(Gateway)
    app.add_middleware(Access)

    async def echo(request: Request) -> dict[str, str]:
        return {"caller": caller_of(request.scope).name, "body": (await request.body()).decode()}

    for path in ECHOED:
        app.api_route(path, methods=["GET", "POST", "DELETE"])(echo)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(caller_of(socket.scope).name)

    return app
