"""The Ray Serve application: an ingress before replicas, between them a router that keeps equal requests together.

A cluster's configuration file names `server.scale.application:application`; see deploy/ray/config.yaml.
"""

from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import cast

import aiohttp
import ray
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from server.scale.figures import one_page
from server.scale.front import Answer, Asked, Front, Head, ReplicaLostError, asked_of
from server.scale.plan import Plan
from server.scale.replica import Replica
from server.scale.router import SessionRouter
from server.scale.sessions import Sessions

_STOP_SECONDS = 30  # for a server to end once its streams have
_HEALTH_SECONDS = 5
_SCRAPE_SECONDS = 10
_STARTS = 3  # that may fail, of all replicas together, before the application counts as failed
_STREAMS = 10_000  # that an ingress passes on at a time
_LOGS = {"log_level": "WARNING", "enable_access_log": False}  # the servers have logs of their own
_ALL = 1_000  # neighbours that a session may spill over to: as many as there are


class Arguments(BaseModel):
    """`args` of the application in a configuration file. `serve`: the words that follow `loramix serve`."""

    model_config = ConfigDict(extra="forbid")
    serve: list[str]


@serve.ingress()
class Ingress:
    """What Ray's proxies call; holds nothing, so there may be any number of it."""

    def __init__(self, replicas: DeploymentHandle, words: Sequence[str]) -> None:
        plan = Plan.read(words)
        presets = dict(word.split("=", 1) for word in plan.options["preset"] or ())
        sessions = Sessions(plan.base_models, plan.options["default_method"], presets)
        limit = int(plan.options["max_body_mib"] * 2**20)
        front = Front(partial(ask, replicas.options(method_name="forward", stream=True)), sessions, limit)
        self._replicas = replicas
        self._app = Starlette(routes=[Route("/metrics", self._metrics), Mount("/", front)])

    async def _metrics(self, request: Request) -> Response:
        """Those of every replica; or what a replica says to who may not see them."""
        asked = asked_of(request.scope, b"")
        everyone = self._replicas.broadcast("whole", asked)
        pages = {}
        for answer in await everyone.results_async(timeout_s=_SCRAPE_SECONDS, return_exceptions=True):
            if isinstance(answer, BaseException):
                continue  # it has ended meanwhile
            name, head, body = answer
            if head.status != HTTPStatus.OK:
                return Response(body, head.status, Headers(raw=head.headers))
            pages[name] = body.decode()
        return Response(one_page(pages), media_type=CONTENT_TYPE_LATEST)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app


async def ask(replicas: DeploymentHandle, asked: Asked, session: str) -> Answer:
    """Have the session's replica answer, by way of Ray."""
    reply = replicas.options(session_id=session).remote(asked)
    try:
        async for piece in reply:
            yield cast(Head | bytes, piece)
    except (
        RayActorError,
        aiohttp.ClientError,
        DeploymentUnavailableError,
        ReplicaUnavailableError,
        BackPressureError,
    ) as error:
        raise ReplicaLostError("the replica that was to answer has ended; try again") from error
    finally:
        reply.cancel()  # where the client has left; else it has ended


def application(arguments: Arguments) -> serve.Application:
    """What a configuration file deploys: one replica unless the file says how many, with the GPUs that it needs."""
    return fleet(Plan.read(arguments.serve), 1)


def fleet(plan: Plan, replicas: int, replica: type[Replica] = Replica) -> serve.Application:
    """The application of so many replicas. Ray has to be up, to be asked for GPUs."""
    gpus = plan.gpus if ray.cluster_resources().get("GPU") else 0
    grace = plan.drain_seconds + _STOP_SECONDS
    servers = serve.deployment(
        replica,
        name="replica",
        num_replicas=replicas,
        max_ongoing_requests=plan.running,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        graceful_shutdown_timeout_s=grace,
        logging_config=_LOGS,
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=_STARTS,
        request_router_config=RequestRouterConfig(
            request_router_class=SessionRouter, request_router_kwargs={"num_fallback_replicas": _ALL}
        ),
    )
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        max_ongoing_requests=_STREAMS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=grace,
        logging_config=_LOGS,
    )
    return ingress.bind(servers.bind(plan.words), plan.words)
