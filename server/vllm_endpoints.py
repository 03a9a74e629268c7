"""vLLM endpoint plugin: puts loramix in front of vLLM's own handlers.

Registered as entry point `loramix` in the group `vllm.endpoint_plugins`; vLLM loads it where VLLM_PLUGINS names it.
"""

import argparse
import asyncio
import logging
import os
import statistics
import time
from collections.abc import Callable

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.datastructures import State
from starlette.types import ASGIApp
from vllm.engine.protocol import EngineClient

from merging import AdapterError, LoramixError
from server.access import Access
from server.admin import Admin
from server.catalog import Catalog
from server.composer import Composer
from server.config import Settings
from server.disk_metrics import WorkerFigures
from server.engine import EngineFacts
from server.errors import ConfigError
from server.gateway import Gateway
from server.keys import Keys, refuse_vllms_keys
from server.metrics import Metrics
from server.request_id import RequestIds
from server.routes import adapters, cache, models, presets, ready, warm
from server.service import Service
from server.sources import adapter_folders
from server.start_fault import started
from server.vllm_engine import VllmEngine
from server.vllm_shutdown import before_shutdown

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own


class LoramixPlugin:
    """The plugin object that vLLM makes, attaches to its app and initialises with its engine."""

    name = "loramix"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add access, the gateway and the routes; vLLM's own list of models gives way to ours."""
        ours = {route.path for route in models.router.routes}  # type: ignore[attr-defined]
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in ours]
        for routes in (models, ready, adapters, cache, warm, presets):
            app.include_router(routes.router)
        app.add_middleware(Gateway)
        if getattr(getattr(app.state, "args", None), "otlp_traces_endpoint", None):
            from server.tracing import Tracing  # not imported where there is nothing to trace

            app.add_middleware(Tracing)
        app.add_middleware(Access)  # the last one added is the first that a request meets
        _put_around(app, RequestIds)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: argparse.Namespace) -> None:
        """Check every adapter against the engine's model, and open for requests.

        Raises:
            SystemExit: where the server cannot start as it was told to, with one readable line.
        """
        assert engine_client is not None, "required_tasks keeps the plugin out of servers without an engine"
        serving = state.openai_serving_models
        base_models = tuple(path.name for path in serving.base_model_paths)
        try:
            settings = Settings.read()
            _refuse_replicas(args)
            refuse_vllms_keys(args)
            keys = Keys(settings.keys_file)
            figures = WorkerFigures()
            REGISTRY.register(figures)
            engine = VllmEngine(engine_client, serving.lora_requests, figures.take)
            facts = await engine.setup(
                settings.adapter_host_bytes, settings.adapter_gpu_bytes, settings.cache_dir, settings.cache_disk_bytes
            )
            catalog = _check_adapters(settings, facts, base_models)
            composer = Composer(
                engine, facts.slots, settings.merge_timeout, Metrics(), settings.merge_queue, settings.cold_merges_per_minute
            )
            admin = Admin.open(settings, catalog, composer, engine)
            if catalog.entries:
                common = statistics.mode(max(entry.ranks.values()) for entry in catalog.entries.values())
                await engine.warm_up(settings.default_method, common)
        except LoramixError as error:
            raise SystemExit(f"loramix: cannot start: {error}") from error  # said once the engine has ended
        specs = admin.presets.specs
        state.loramix = Service(base_models, catalog, specs, composer, settings.default_method, settings.max_body_bytes)
        state.loramix_admin = admin
        if settings.state_dir is not None:
            state.loramix_watch = asyncio.create_task(admin.watch.run())
        before_shutdown(engine_client, state.loramix.drain, settings.merge_timeout)
        state.loramix_keys = keys
        state.loramix_started = int(time.time())
        state.loramix_max_model_len = engine_client.model_config.max_model_len
        started()
        if not keys and _in_reach(args):
            logger.warning("no keys, and not on loopback: whoever reaches this server may use it (--keys-file, SECURITY.md)")
        logger.info(
            "loramix: %d adapters, %d presets; %d slots of rank %d in %s on %s",
            len(catalog.entries), len(specs), facts.slots, facts.max_rank, facts.dtype, facts.device,
        )  # fmt: skip


def _put_around(app: FastAPI, middleware: Callable[[ASGIApp], ASGIApp]) -> None:
    """Put a middleware around all others, vLLM's own, which are added later, and the one that answers what nobody caught."""
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: middleware(build())  # type: ignore[method-assign]


def _check_adapters(settings: Settings, facts: EngineFacts, base_models: tuple[str, ...]) -> Catalog:
    reserved = frozenset(base_models)
    catalog = Catalog(facts.modules, facts.max_rank, facts.dtype, reserved, settings.max_adapters_per_recipe)
    for name, folder in adapter_folders(settings):
        try:
            catalog.add(name, folder)
        except AdapterError as error:
            if not settings.skip_bad_adapters:
                raise ConfigError(f"{error} (or start without it: --skip-bad-adapters)") from error
            logger.warning("skipped: %s", error)
    return catalog


def _in_reach(args: argparse.Namespace) -> bool:
    """Whether other machines may reach the server, and vLLM asks them for no key."""
    guarded = args.api_key or os.environ.get("VLLM_API_KEY") or getattr(args, "uds", None)
    return not guarded and args.host not in ("127.0.0.1", "localhost", "::1")


def _refuse_replicas(args: argparse.Namespace) -> None:
    """Leases live in one process: more API servers or engine replicas would evict each other's adapters."""
    for option in ("api_server_count", "data_parallel_size"):
        if (getattr(args, option, None) or 1) > 1:
            raise ConfigError(
                f"--{option.replace('_', '-')} over 1 is not supported; run several servers behind a router instead"
            )
