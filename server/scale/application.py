"""The Ray Serve application: an ingress before replicas, between them a router that keeps equal requests together.

A cluster's configuration file names `server.scale.application:application`; see deploy/ray/config.yaml.
"""

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import RequestRouterConfig

from server.scale.ingress import Ingress
from server.scale.plan import Plan
from server.scale.replica import Replica
from server.scale.router import SessionRouter

_STOP_SECONDS = 30  # for a server to end once its streams have
_HEALTH_SECONDS = 5
_STARTS = 3  # that may fail, of all replicas together, before the application counts as failed
_STREAMS = 10_000  # that an ingress passes on at a time
_LOGS = {"log_level": "WARNING", "enable_access_log": False}  # the servers have logs of their own
_ALL = 1_000  # neighbours that a session may spill over to: as many as there are


class Arguments(BaseModel):
    """`args` of the application in a configuration file. `serve`: the words that follow `loramix serve`."""

    model_config = ConfigDict(extra="forbid")
    serve: list[str]


def application(arguments: Arguments) -> serve.Application:
    """What a configuration file deploys: one replica unless the file says how many, with the GPUs that it needs."""
    return fleet(Plan.read(arguments.serve), 1, host=None)


def fleet(plan: Plan, replicas: int, host: str | None, replica: type[Replica] = Replica) -> serve.Application:
    """The application of so many replicas. Ray has to be up, to be asked for GPUs.

    Args:
        host: where the replicas' servers listen; None for their nodes' addresses in the cluster.
    """
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
    return ingress.bind(servers.bind(plan.words, host), plan.words)
