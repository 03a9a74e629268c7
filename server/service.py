"""The service: catalog, presets and composer behind one request-level question, what recipe does it ask for?"""

from asyncio import Event
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging import MergeSpec, Term
from merging.errors import nearest, shown
from server.asked import asked_spec
from server.caller import Caller
from server.catalog import Catalog, Recipe
from server.composer import Composer
from server.errors import UnknownModelError


@dataclass(frozen=True)
class Service:
    """Everything that requests are answered with; made once the engine is up.

    Attributes:
        base_models: the names of the base model, as served.
        presets: specs by preset name.
        default_method: merges a sum that names no method.
        max_body_bytes: what is read of a request's body at most.
        draining: set once the server is told to stop: what it has taken is finished, and nothing new taken.
    """

    base_models: tuple[str, ...]
    catalog: Catalog
    presets: Mapping[str, MergeSpec]
    composer: Composer
    default_method: str
    max_body_bytes: int = 32 * 2**20
    draining: Event = field(default_factory=Event)

    async def drain(self) -> None:
        """Take no more requests, and wait until no build is under way: from then on the engine may be told to stop."""
        self.draining.set()
        await self.composer.settled()

    def visible(self, caller: Caller) -> tuple[list[str], dict[str, MergeSpec]]:
        """The adapters that `caller` may use, and the presets that are made of such adapters alone."""
        presets = {name: spec for name, spec in self.presets.items() if _may_use(caller, spec)}
        return list(filter(caller.may_use, self.catalog.entries)), presets

    def recipe_of(self, payload: Mapping[str, Any], caller: Caller) -> Recipe | None:
        """The recipe of a request's body; None where it asks for the base model, or vLLM has to complain.

        What the caller may not use is as what is not there.

        Raises:
            UnknownModelError, RecipeError, RequestError: see server/errors.py.
        """
        spec = asked_spec(payload, self.base_models, self.default_method, lambda name: self._named(name, caller))
        return None if spec is None else self.catalog.resolve(spec, caller)

    def _named(self, name: str, caller: Caller) -> MergeSpec:
        preset = self.presets.get(name)
        if preset is not None and _may_use(caller, preset):
            return preset
        if name not in self.catalog.entries or not caller.may_use(name):
            known = [*self.base_models, *(name for names in self.visible(caller) for name in names)]
            raise UnknownModelError(f"no model, adapter or preset {shown(name)} here{nearest(name, known)}")
        return MergeSpec.create("cat", [Term(name)])


def _may_use(caller: Caller, preset: MergeSpec) -> bool:
    return all(caller.may_use(term.adapter) for term in preset.terms)
