"""GET /ready: whether requests may be sent here, for load balancers. `/health`, vLLM's own, says whether the engine lives."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.errors import RETRY_AFTER_SECONDS
from server.service import Service

router = APIRouter()


class Readiness(BaseModel):
    """`draining`: what was taken is being finished, and nothing new is."""

    status: Literal["ready", "draining"]


@router.get("/ready", responses={503: {"model": Readiness, "description": "It is being shut down; ask another server."}})
def ready(request: Request, response: Response) -> Readiness:
    """200 once the model is loaded and every adapter is checked; 503 from the moment the server is told to stop."""
    service: Service = request.app.state.loramix
    if not service.draining.is_set():
        return Readiness(status="ready")
    response.status_code = 503
    response.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return Readiness(status="draining")
