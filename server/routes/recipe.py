"""A recipe in the body of an admin route: an expression, or a body object `lora`."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from server.asked import MAX_EXPRESSION
from server.grammar import LoraObject

_Expression = Annotated[str, Field(min_length=1, max_length=MAX_EXPRESSION)]


def _kind(value: Any) -> str:
    return "expression" if isinstance(value, str) else "object"


Recipe = Annotated[
    Annotated[_Expression, Tag("expression")] | Annotated[LoraObject, Tag("object")],
    Discriminator(_kind),
    Field(examples=["lego-8(math*0.7+code)", {"adapters": [{"name": "math"}, {"name": "code", "weight": 0.5}]}]),
]


def plain(recipe: str | LoraObject) -> Any:
    """As a request has it."""
    return recipe if isinstance(recipe, str) else recipe.model_dump(exclude_unset=True)
