"""POST /v1/lora/warm: builds a merged adapter before anybody asks for it, and keeps it if that is wanted."""

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from server.caller import caller_of
from server.errors import RequestError
from server.routes.admin_route import admin_of, admin_router, refusals
from server.routes.recipe import Recipe, plain
from server.service import Service

router = admin_router("cache")


class Warm(BaseModel):
    """What is to be built: a model string, as requests give it, or a body object `lora`."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"recipe": "cat(math*0.7+code)", "pin": True}]}
    )
    recipe: Recipe
    pin: bool = Field(default=False, description="Whether to keep it in its slot until it is deleted from the cache.")


class Warmed(BaseModel):
    """What is resident now."""

    key: str
    name: str
    tier: str = Field(description="Where it was: `device`, `disk` or `merged`, as in the header x-loramix-cache.")
    ms: float = Field(description="Milliseconds that this waited for its build.")
    pinned: bool


@router.post("/warm", responses=refusals(400, 404, 409, 503))
async def warm(request: Request, asked: Warm) -> Warmed:
    """Have a merged adapter in a slot, by the rules for requests, with their errors. Pins are kept until
    DELETE /v1/lora/cache/{key}, or until an adapter of theirs is deleted or replaced."""
    service: Service = request.app.state.loramix
    caller = caller_of(request.scope)
    field = "model" if isinstance(asked.recipe, str) else "lora"
    recipe = service.recipe_of({field: plain(asked.recipe)}, caller)
    if recipe is None:
        raise RequestError("recipe: the base model needs no merging; name an adapter, a preset or a recipe", "recipe")
    cache = admin_of(request).cache
    lease = await cache.warm(recipe, caller.name, pin=asked.pin)
    return Warmed(
        key=lease.key, name=lease.name, tier=lease.tier, ms=round(lease.waited_ms, 1), pinned=cache.is_pinned(lease.key)
    )
