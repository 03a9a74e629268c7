"""/v1/lora/adapters: the adapters that requests can name, added, replaced and deleted while the server runs."""

from collections import Counter
from typing import Annotated, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.admin import Admin
from server.routes.admin_route import Name, admin_of, admin_router, refusals
from server.wanted import Wanted

router = admin_router("adapters")
_Path = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
_Repo = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*$")]
_Revision = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._/-]+$")]


class NewAdapter(BaseModel):
    """An adapter to be added: `path`, or `repo`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"name": "math", "path": "math-v2"}, {"name": "math", "repo": "org/math-lora"}]},
    )
    name: Name
    path: _Path | None = Field(default=None, description="A PEFT folder, absolute or relative to an allowed root.")
    repo: _Repo | None = Field(default=None, description="ORG/REPO on the Hub, of those that --hub-allow names.")
    revision: _Revision | None = Field(default=None, description="Commit, branch or tag of `repo`.")

    @model_validator(mode="after")
    def _one_place(self) -> "NewAdapter":
        if (self.path is None) == (self.repo is None):
            raise ValueError("give one of path and repo")
        if self.revision is not None and self.repo is None:
            raise ValueError("revision goes with repo; leave it out")
        return self


class AdapterCard(BaseModel):
    """An adapter."""

    name: str
    digest: str = Field(description="Of its content; with other content it is another adapter, whatever its name.")
    rank: int = Field(description="The largest of its modules.")
    modules: int
    bytes: int = Field(description="Of its factors.")
    base_model: str | None = Field(description="That it says it was trained on.")
    path: str = Field(description="Its folder.")
    repo: str | None = Field(description="Where it was fetched from, if it was added from the Hub.")
    revision: str | None = Field(description="The commit of `repo`.")
    compositions: int = Field(description="Merged adapters made of it that are in slots now.")
    given: bool = Field(description="Whether the command line has this name: then it has it again at the next start.")
    kept: bool = Field(description="Whether it is there again at the next start because it is in --state-dir.")


class AdapterChange(AdapterCard):
    """An adapter that was added. `unchanged`: the same content had this name before; `replaced`: other content had."""

    outcome: Literal["added", "unchanged", "replaced"]


class Skipped(BaseModel):
    """What was kept in --state-dir and could not be had at the start. Adding it again, or deleting it, ends that."""

    name: str
    reason: str


class AdapterList(BaseModel):
    """All adapters, by name."""

    object: Literal["list"] = "list"
    data: list[AdapterCard]
    skipped: list[Skipped]


@router.get("/adapters", responses=refusals())
async def list_adapters(request: Request) -> AdapterList:
    """All adapters, and what each takes up."""
    admin = admin_of(request)
    compositions = admin.cache.compositions()
    return AdapterList(
        data=[_card(admin, name, compositions) for name in sorted(admin.adapters.all)],
        skipped=[Skipped(name=name, reason=reason) for name, reason in sorted(admin.adapters.skipped.items())],
    )


@router.post("/adapters", status_code=201, responses={**refusals(400, 403, 409, 503), 200: {"model": AdapterChange}})
async def add_adapter(request: Request, response: Response, new: NewAdapter) -> AdapterChange:
    """Add an adapter, or give its name other content. It is checked whole first; until then what had the name keeps it.

    With other content it is another adapter, and nothing that was merged or cached of the old one answers for it. Requests that
    run under the old one go on with that. 201 for a new name, 200 else.
    """
    admin = admin_of(request)
    outcome = await admin.adapters.add(new.name, Wanted(new.path, new.repo, new.revision))
    if outcome != "added":
        response.status_code = 200
    return AdapterChange(**_card(admin, new.name, admin.cache.compositions()).model_dump(), outcome=outcome)


@router.delete("/adapters/{name}", status_code=204, responses=refusals(404, 409, 503))
async def delete_adapter(request: Request, name: str) -> None:
    """Delete an adapter: new requests do not find it from now on. The answer comes when those that use it have ended, and
    slots and memory are free of it; it happens all the same if nobody waits for the answer.

    Entries of the disk cache that were made of it stay until they make room: they are found by content alone, so they do no
    harm.
    """
    await admin_of(request).adapters.remove(name)


def _card(admin: Admin, name: str, compositions: Counter[str]) -> AdapterCard:
    entry = admin.adapters.all[name]
    origin = admin.adapters.origins.get(name)
    return AdapterCard(
        name=name, digest=entry.source.digest, rank=entry.rank, modules=len(entry.ranks), bytes=entry.source.nbytes,
        base_model=entry.base_model, path=str(entry.source.path), repo=origin.repo if origin else None,
        revision=origin.revision if origin else None, compositions=compositions[entry.source.digest],
        given=name in admin.adapters.given, kept=name in admin.adapters.kept,
    )  # fmt: skip
