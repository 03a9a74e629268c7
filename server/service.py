"""The service: catalog, presets and composer behind one request-level question, what recipe does it ask for?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging import MergeSpec, Term
from merging.errors import nearest, shown
from server.catalog import Catalog, Recipe
from server.composer import Composer
from server.errors import RequestError, UnknownModelError
from server.grammar import is_name, parse_expression, parse_object


@dataclass(frozen=True)
class Service:
    """Everything that requests are answered with; made once the engine is up.

    Attributes:
        base_models: the names of the base model, as served.
        presets: specs by preset name.
        default_method: merges a sum that names no method.
    """

    base_models: tuple[str, ...]
    catalog: Catalog
    presets: Mapping[str, MergeSpec]
    composer: Composer
    default_method: str

    def recipe_of(self, payload: Mapping[str, Any]) -> Recipe | None:
        """The recipe of a request's body; None where it asks for the base model, or vLLM has to complain.

        Raises:
            UnknownModelError, RecipeError, RequestError: see server/errors.py.
        """
        model, lora = payload.get("model"), payload.get("lora")
        if model is not None and not isinstance(model, str):
            return None
        plain = not model or model in self.base_models
        if lora is not None:
            if not plain:
                raise RequestError(
                    f"both a body object lora and model {shown(model)}; give the recipe once "
                    f"(model {self.base_models[0]!r} goes with lora)",
                    "lora",
                )
            return self.catalog.resolve(parse_object(lora, self.default_method))
        return None if plain else self.catalog.resolve(self._spec_of(str(model)))

    def _spec_of(self, model: str) -> MergeSpec:
        if model in self.presets:
            return self.presets[model]
        if is_name(model) and model not in self.catalog.entries:
            known = [*self.base_models, *self.catalog.entries, *self.presets]
            raise UnknownModelError(f"no model, adapter or preset {shown(model)} here{nearest(model, known)}")
        if model in self.catalog.entries:
            return MergeSpec.create("cat", [Term(model)])
        return parse_expression(model, self.default_method)
