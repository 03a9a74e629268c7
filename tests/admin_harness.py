"""What the tests of the admin routes share: loramix's middleware and admin routes over a composer with a fake engine."""

import asyncio
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from access_harness import ADMIN, FILE, bearer
from fastapi import FastAPI, Request
from harness import MODULES, Harness, tiny_adapter

from merging import save_adapter
from server.access import Access
from server.admin import Admin
from server.catalog import Catalog
from server.config import Settings
from server.gateway import Gateway
from server.keys import Keys
from server.routes import adapters, cache, models, presets, warm
from server.service import Service
from server.sources import adapter_folders

COMPLETIONS = "/v1/completions"


class Site:
    """A server without vLLM, as it is started over a folder; to be entered on an event loop.

    `root/adapters` holds math, code (rank 4) and style (rank 2), which the command line has; `root/more` is an allowed root
    with nothing in it; `root/outside` holds an adapter that nobody allowed.
    """

    def __init__(self, root: Path, slots: int = 3, hold: bool = False, **settings: Any) -> None:
        self.root = root
        if not (root / "adapters").exists():
            for seed, (name, rank) in enumerate({"math": 4, "code": 4, "style": 2}.items()):
                save_adapter(tiny_adapter(rank, seed), root / "adapters" / name)
            save_adapter(tiny_adapter(4, 9), root / "outside" / "secret")
            (root / "more").mkdir()
        given = {"adapters": [root / "adapters"], "adapter_root": [root / "more"], "state_dir": root / "state", **settings}
        self.settings = Settings(**given)
        catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
        for name, folder in adapter_folders(self.settings):
            catalog.add(name, folder)
        self.harness = Harness(catalog, slots, hold, timeout=5.0)
        self.engine = self.harness.engine
        self.admin = Admin.open(self.settings, catalog, self.harness.composer, self.engine)
        self.app = self._app(catalog)
        self.client = self.by("boss")

    def _app(self, catalog: Catalog) -> FastAPI:
        keys = self.root / "keys.toml"
        keys.write_text(FILE + ADMIN)
        keys.chmod(0o600)
        app = FastAPI()
        app.state.loramix = Service(("tiny",), catalog, self.admin.presets.specs, self.harness.composer, "cat", 2**20)
        app.state.loramix_admin = self.admin
        app.state.loramix_keys = Keys(keys)
        app.state.loramix_started, app.state.loramix_max_model_len = 0, 512
        for routes in (models, adapters, cache, warm, presets):
            app.include_router(routes.router)
        app.post(COMPLETIONS)(self._complete)
        app.add_middleware(Gateway)
        app.add_middleware(Access)
        self.streaming: asyncio.Event | None = None
        return app

    async def _complete(self, request: Request) -> dict[str, Any]:
        """In the place of vLLM's: says what it was asked for, once the test lets it."""
        model = (await request.json())["model"]
        if self.streaming is not None:
            await self.streaming.wait()
        return {"model": model}

    def by(self, key: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=bearer(key))

    async def __aenter__(self) -> "Site":
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.client.aclose()

    async def ask(self, model: str) -> httpx.Response:
        return await self.client.post(COMPLETIONS, json={"model": model})

    async def names(self) -> list[str]:
        """As clients see them."""
        return [card["id"] for card in (await self.client.get("/v1/models")).json()["data"]]

    async def get(self, path: str) -> Any:
        reply = await self.client.get(f"/v1/lora/{path}")
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def post(self, path: str, /, **body: Any) -> httpx.Response:
        # Encoded here: httpx refuses what JSON can say and UTF-8 cannot.
        headers = {"content-type": "application/json"}
        return await self.client.post(f"/v1/lora/{path}", content=json.dumps(body), headers=headers)

    async def delete(self, path: str) -> httpx.Response:
        return await self.client.delete(f"/v1/lora/{path}")

    def put(self, name: str, seed: int, rank: int = 4, under: str = "more") -> Path:
        """Have an adapter of other content lie there."""
        folder = self.root / under / name
        if folder.exists():
            shutil.rmtree(folder)
        save_adapter(tiny_adapter(rank, seed), folder)
        return folder


def refused(reply: httpx.Response, status: int, *words: str) -> None:
    """That it is refused in loramix's form, in one line, with these words."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    for word in words:
        assert word in error["message"], error["message"]
    assert len(error["message"]) < 2000
