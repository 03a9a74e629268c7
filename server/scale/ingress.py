"""What Ray's proxies call: finds a replica for each request by Ray's router, and asks its server."""

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import aclosing
from http import HTTPStatus

import aiohttp
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from server.scale.client import Client, Place
from server.scale.figures import one_page
from server.scale.front import Answer, Asked, Front, ReplicaLostError, asked_of
from server.scale.plan import Plan
from server.scale.sessions import Sessions

_SCRAPE_SECONDS = 10
_END_SECONDS = 1.0
_RAYS = (RayActorError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)


@serve.ingress()
class Ingress:
    """Holds nothing but connections, so there may be any number of it."""

    def __init__(self, replicas: DeploymentHandle, words: Sequence[str]) -> None:
        plan = Plan.read(words)
        presets = dict(word.split("=", 1) for word in plan.options["preset"] or ())
        sessions = Sessions(plan.base_models, plan.options["default_method"], presets)
        front = Front(self._ask, sessions, int(plan.options["max_body_mib"] * 2**20))
        self._replicas = replicas
        self._client = Client()
        self._app = Starlette(routes=[Route("/metrics", self._metrics), Mount("/", front)])

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._app

    async def _ask(self, asked: Asked, session: str) -> Answer:
        """Ray's router chooses the replica, which counts the request as its own until `held` is cancelled."""
        held = self._replicas.options(method_name="hold", stream=True, session_id=session).remote()
        try:
            place: Place = await anext(held)
            async with aclosing(self._client.answer(place, asked)) as answer:
                async for piece in answer:
                    yield piece
        except aiohttp.ClientError as error:
            # If the server has ended, its actor does so too, and the router, hearing of it here, sends the next try elsewhere.
            with contextlib.suppress(TimeoutError, *_RAYS):
                await asyncio.wait_for(anext(held), _END_SECONDS)
            raise _lost() from error
        except _RAYS as error:
            raise _lost() from error
        finally:
            held.cancel()

    async def _metrics(self, request: Request) -> Response:
        """Those of every replica; or what a replica says to who may not see them."""
        asked = asked_of(request.scope, b"")
        everyone = self._replicas.broadcast("place")
        places = await everyone.results_async(timeout_s=_SCRAPE_SECONDS, return_exceptions=True)
        there = [place for place in places if isinstance(place, Place)]  # the others have ended meanwhile
        answers = await asyncio.gather(*(self._client.whole(place, asked) for place in there), return_exceptions=True)
        pages = {}
        for place, answer in zip(there, answers, strict=True):
            if isinstance(answer, aiohttp.ClientError):
                continue
            if isinstance(answer, BaseException):
                raise answer
            head, body = answer
            if head.status != HTTPStatus.OK:
                return Response(body, head.status, Headers(raw=head.headers))
            pages[place.name] = body.decode()
        return Response(one_page(pages), media_type=CONTENT_TYPE_LATEST)


def _lost() -> ReplicaLostError:
    return ReplicaLostError("the replica that was to answer has ended; try again")
