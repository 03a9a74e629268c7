"""The service: catalog, presets and composer behind one request-level question, what recipe does it ask for?"""

from asyncio import Event
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging import MergeSpec, Term
from merging.errors import nearest, shown
from server.caller import Caller
from server.catalog import Catalog, Recipe
from server.composer import Composer
from server.errors import LimitError, RequestError, UnknownModelError
from server.grammar import is_name, parse_expression, parse_object

MAX_EXPRESSION = 4096
"""Characters of a model string: sixteen adapters with long names, and room."""


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
        model, lora = payload.get("model"), payload.get("lora")
        if model is not None and not isinstance(model, str):
            return None
        if model is not None and len(model) > MAX_EXPRESSION:
            raise LimitError(f"model is {len(model)} characters long; use {MAX_EXPRESSION} at most, or a preset", "model")
        plain = not model or model in self.base_models
        if lora is not None:
            if not plain:
                raise RequestError(
                    f"both a body object lora and model {shown(model)}; give the recipe once "
                    f"(model {self.base_models[0]!r} goes with lora)",
                    "lora",
                )
            return self.catalog.resolve(parse_object(lora, self.default_method), caller)
        return None if plain else self.catalog.resolve(self._spec_of(str(model), caller), caller)

    def _spec_of(self, model: str, caller: Caller) -> MergeSpec:
        preset = self.presets.get(model)
        if preset is not None and _may_use(caller, preset):
            return preset
        if not is_name(model):
            return parse_expression(model, self.default_method)
        if model not in self.catalog.entries or not caller.may_use(model):
            known = [*self.base_models, *(name for names in self.visible(caller) for name in names)]
            raise UnknownModelError(f"no model, adapter or preset {shown(model)} here{nearest(model, known)}")
        return MergeSpec.create("cat", [Term(model)])


def _may_use(caller: Caller, preset: MergeSpec) -> bool:
    return all(caller.may_use(term.adapter) for term in preset.terms)
