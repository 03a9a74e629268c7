"""/v1/lora/cache: the merged adapters that are in slots, or on their way there."""

from typing import Literal

from fastapi import Request
from pydantic import BaseModel, Field

from server.routes.admin_route import admin_of, admin_router, refusals
from server.slots import Entry

router = admin_router("cache")


class CacheEntry(BaseModel):
    """A merged adapter."""

    key: str = Field(description="Of its content: adapters, weights, method, options.")
    name: str = Field(description="Its recipe, and the beginning of its key.")
    state: Literal["resident", "building"] = Field(description="`building`: being merged, or waiting for a slot.")
    leases: int = Field(description="Requests that use it, or wait for it.")
    pinned: bool
    bytes: int | None = Field(description="Of its slot; null while it has none.")
    source: Literal["merged", "disk"] | None = Field(description="Whether it was merged, or read from the disk cache.")
    idle_seconds: float = Field(description="Since a lease of it began or ended.")


class SlotCount(BaseModel):
    """The engine's slots. `pins`: how many may be pinned at most; one is left for all else."""

    total: int
    free: int
    pins: int


class CacheList(BaseModel):
    """All that is resident or being built, the one unused for longest first."""

    object: Literal["list"] = "list"
    data: list[CacheEntry]
    slots: SlotCount


@router.get("/cache", responses=refusals())
async def list_cache(request: Request) -> CacheList:
    """What is in slots. How often it was found there, /metrics says."""
    cache = admin_of(request).cache
    cards = [_card(entry, idle) for entry, idle in cache.idle_seconds()]
    return CacheList(data=cards, slots=SlotCount(total=cache.slots, free=cache.free_slots, pins=cache.most_pins))


@router.delete("/cache/{key}", status_code=204, responses=refusals(404, 409, 503))
async def evict(request: Request, key: str) -> None:
    """Empty the slot of a merged adapter, pinned or not. The whole key is asked for. 409 while requests use it."""
    await admin_of(request).cache.evict(key)


def _card(entry: Entry, idle_seconds: float) -> CacheEntry:
    resident = entry.resident
    return CacheEntry(
        key=entry.recipe.key, name=entry.recipe.name, state="building" if resident is None else "resident",
        leases=entry.leases.total(), pinned=entry.pinned, bytes=resident.nbytes if resident else None,
        source=None if resident is None else "disk" if resident.disk == "hit" else "merged",
        idle_seconds=round(idle_seconds, 3),
    )  # fmt: skip
