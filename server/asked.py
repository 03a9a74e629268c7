"""What a request's body asks for, as a spec: by names alone, whatever they stand for here.

Servers look the names up in their catalog; a router in front of servers (server/scale/) needs no more than that two
requests mean the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging import MergeSpec
from merging.errors import shown
from server.errors import LimitError, RequestError
from server.grammar import is_name, parse_expression, parse_object

MAX_EXPRESSION = 4096
"""Characters of a model string: sixteen adapters with long names, and room."""


def asked_spec(
    payload: Mapping[str, Any], base_models: Sequence[str], default_method: str, named: Callable[[str], MergeSpec]
) -> MergeSpec | None:
    """The spec of a body; None where it asks for the base model, or vLLM has to complain.

    Args:
        base_models: names of the base model, the first to be recommended.
        default_method: merges a sum that names no method.
        named: what the name of an adapter or a preset means.

    Raises:
        RecipeError, RequestError: see server/errors.py; and whatever `named` raises.
    """
    model, lora = payload.get("model"), payload.get("lora")
    if model is not None and not isinstance(model, str):
        return None
    if model is not None and len(model) > MAX_EXPRESSION:
        raise LimitError(f"model is {len(model)} characters long; use {MAX_EXPRESSION} at most, or a preset", "model")
    plain = not model or model in base_models
    if lora is not None:
        if not plain:
            raise RequestError(
                f"both a body object lora and model {shown(model)}; give the recipe once "
                f"(model {base_models[0]!r} goes with lora)",
                "lora",
            )
        return parse_object(lora, default_method)
    if plain:
        return None
    return named(str(model)) if is_name(str(model)) else parse_expression(str(model), default_method)
