"""GET /v1/models: what clients may pick from. Base model, and the adapters and presets that they may use; compositions made
ad hoc never."""

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server.caller import caller_of
from server.grammar import readable
from server.service import Service

router = APIRouter()


class ModelCard(BaseModel):
    """One model, as OpenAI lists it. `root` says what it is made of, `parent` what it adapts."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """All models."""

    object: str = "list"
    data: list[ModelCard]


@router.get("/v1/models")
def list_models(request: Request) -> ModelList:
    """Base model, adapters and presets, as far as the caller may use them."""
    service: Service = request.app.state.loramix
    started: int = request.app.state.loramix_started
    length: int = request.app.state.loramix_max_model_len
    base = service.base_models[0]
    cards = [
        ModelCard(id=name, created=started, owned_by="vllm", root=base, max_model_len=length) for name in service.base_models
    ]
    adapters, presets = service.visible(caller_of(request.scope))
    own = {name: name for name in adapters} | {name: readable(spec) for name, spec in presets.items()}
    cards += [
        ModelCard(id=name, created=started, owned_by="loramix", root=root, parent=base, max_model_len=length)
        for name, root in own.items()
    ]
    return ModelList(data=cards)
