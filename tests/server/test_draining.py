"""A server that is told to stop finishes what it has, takes nothing new, and says so."""

import asyncio
from collections.abc import Callable

import httpx
from fastapi import FastAPI
from harness import Harness, settle

from server.access import Access
from server.gateway import Gateway
from server.keys import Keys
from server.routes import ready
from server.service import Service


def app_of(harness: Harness) -> FastAPI:
    app = FastAPI()
    app.state.loramix = Service(("tiny",), harness.catalog, {}, harness.composer, "cat")
    app.state.loramix_keys = Keys(None)
    app.include_router(ready.router)
    app.post("/v1/completions")(lambda: "answered")
    app.add_middleware(Gateway)
    app.add_middleware(Access)
    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_readiness_ends_with_draining(make_harness: Callable[..., Harness]) -> None:
    app = app_of(make_harness())
    async with client_of(app) as client:
        reply = await client.get("/ready")
        assert (reply.status_code, reply.json()) == (200, {"status": "ready"})
        await app.state.loramix.drain()
        reply = await client.get("/ready")
        assert (reply.status_code, reply.json()) == (503, {"status": "draining"})
        assert reply.headers["retry-after"] == "1"


async def test_what_waits_for_its_merge_is_answered_and_nothing_new_is_taken(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(hold=True)
    app = app_of(harness)
    async with client_of(app) as client:
        waiting = asyncio.create_task(client.post("/v1/completions", json={"model": "math+code"}))
        await settle()
        draining = asyncio.create_task(app.state.loramix.drain())
        await settle()
        for model in ("math", "tiny"):  # an adapter, and the base model
            reply = await client.post("/v1/completions", json={"model": model})
            assert reply.status_code == 503
            assert "being shut down" in reply.json()["error"]["message"]
            assert reply.headers["retry-after"] == "1"
        assert not draining.done()
        harness.engine.finish(harness.recipe("math+code"))
        assert (await waiting).json() == "answered"
        await draining
    assert harness.metric("loramix_refused_total", reason="draining") == 2
    assert harness.metric("loramix_leases") == 0


async def test_a_build_that_fails_does_not_keep_a_server_from_stopping(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(hold=True)
    recipe = harness.recipe("math+code")
    harness.engine.failures[recipe.key] = RuntimeError("no memory")
    app = app_of(harness)
    asking = asyncio.create_task(harness.composer.ensure(recipe, "somebody"))
    await settle()
    draining = asyncio.create_task(app.state.loramix.drain())
    harness.engine.finish(recipe)
    await asyncio.wait_for(draining, 5)
    assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], RuntimeError)
