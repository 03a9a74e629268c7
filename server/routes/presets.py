"""/v1/lora/presets: recipes with a name, added, replaced and deleted while the server runs."""

from typing import Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from server.admin import Admin
from server.grammar import LoraObject, readable
from server.preset_file import lora_object
from server.routes.adapters import Skipped
from server.routes.admin_route import Name, admin_of, admin_router, refusals
from server.routes.recipe import Recipe

router = admin_router("presets")


class NewPreset(BaseModel):
    """A preset to be added: a name and an expression or body object, or a name and what is in a file of `loramix fit`."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"name": "tutor", "recipe": "lego-8(math+code)"}]}
    )
    name: Name
    recipe: Recipe
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="Digests by adapter: then the preset is for this content alone. Left out, it follows the adapters' names.",
    )
    fit: dict[str, Any] = Field(
        default_factory=dict, description="How the recipe was found; kept, and otherwise not looked at."
    )


class PresetCard(BaseModel):
    """A preset."""

    name: str
    recipe: str = Field(description="For people; weights by module are `…`.")
    lora: LoraObject = Field(description="The same, exactly.")
    adapters: dict[str, str] = Field(description="Digests by adapter, where it is for this content alone.")
    given: bool = Field(description="Whether the command line has this name: then it has it again at the next start.")
    kept: bool = Field(description="Whether it is there again at the next start because it is in --state-dir.")


class PresetList(BaseModel):
    """All presets, by name."""

    object: Literal["list"] = "list"
    data: list[PresetCard]
    skipped: list[Skipped]


@router.get("/presets", responses=refusals())
async def list_presets(request: Request) -> PresetList:
    """All presets. Clients see those that they may use in /v1/models."""
    admin = admin_of(request)
    return PresetList(
        data=[_card(admin, name) for name in sorted(admin.presets.all)],
        skipped=[Skipped(name=name, reason=reason) for name, reason in sorted(admin.presets.skipped.items())],
    )


@router.post("/presets", status_code=201, responses={**refusals(400, 404, 409, 503), 200: {"model": PresetCard}})
async def add_preset(request: Request, response: Response, new: NewPreset) -> PresetCard:
    """Add a preset, or give its name another recipe. 201 for a new name, 200 else."""
    admin = admin_of(request)
    if not await admin.presets.add(new.name, new.recipe, new.adapters, new.fit):
        response.status_code = 200
    return _card(admin, new.name)


@router.delete("/presets/{name}", status_code=204, responses=refusals(404, 503))
async def delete_preset(request: Request, name: str) -> None:
    """Delete a preset: new requests do not find it from now on, running ones go on."""
    await admin_of(request).presets.remove(name)


def _card(admin: Admin, name: str) -> PresetCard:
    preset = admin.presets.all[name]
    return PresetCard(
        name=name, recipe=readable(preset.spec), lora=lora_object(preset.spec), adapters=dict(preset.made_for),
        given=preset.given, kept=preset.kept,
    )  # fmt: skip
