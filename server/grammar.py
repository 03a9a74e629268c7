"""The recipe language: model string or body object <-> MergeSpec.

    recipe = method [ "-" number ] "(" sum ")" | sum          lego-16(math*0.7+code)
    sum    = term { "+" term }                                math+code
    term   = name [ "*" weight ]                              style*-0.5
    name   = one or more of A-Z a-z 0-9 . _ -

NUMBER is the method's own main parameter (rank, for most). A sum alone is merged by the default method.
Spaces between the parts do not count.
"""

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from merging import METHODS, MergeSpec, RecipeError, Term
from merging.errors import nearest, shown
from merging.spec import MAX_TERMS
from merging.term import WILD
from server.errors import RecipeSyntaxError, RequestError

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_WEIGHT = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]-?[0-9]+)?")
_CALL = re.compile(r"(?P<method>[A-Za-z0-9._-]*?)(?:-(?P<number>[0-9]+(?:\.[0-9]+)?))?")
_MAX_WILD = 128  # patterns of one adapter: one for each layer of the largest models
_Name = Annotated[str, Field(max_length=256)]  # of anything: unknown ones are compared with the known ones
_LONGEST_FIELD = 64  # characters of a field's name that an error repeats; what is longer is no field of ours
_SPACE = re.compile(r"\s*")


def _few_wild(weights: dict[str, float]) -> dict[str, float]:
    """Each wild pattern is held against every module, which takes time; names of modules are looked up."""
    wild = sum(not WILD.isdisjoint(pattern) for pattern in weights)
    if wild > _MAX_WILD:
        raise ValueError(f"{wild} patterns with *, ? or [; use {_MAX_WILD} at most, or the modules' names")
    return weights


class WeightedAdapter(BaseModel):
    """One adapter of a recipe object."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: _Name
    weight: float | Annotated[dict[_Name, float], Field(max_length=2048), AfterValidator(_few_wild)] = 1.0
    """A number, or numbers by pattern of module names: `{"*.q_proj": 0.5, "*": 1.0}`, the first that matches counts."""


class LoraObject(BaseModel):
    """The body object `lora`: a recipe with everything that an expression cannot say."""

    model_config = ConfigDict(extra="forbid", strict=True)
    method: _Name | None = None
    adapters: list[WeightedAdapter] = Field(max_length=4 * MAX_TERMS)  # what is over MAX_TERMS is refused in better words
    rank: int | None = None
    options: dict[_Name, Any] = Field(default_factory=dict, max_length=64)


def is_name(text: str) -> bool:
    """Whether `text` can name an adapter or a preset."""
    return _NAME.fullmatch(text) is not None


def parse_expression(text: str, default_method: str) -> MergeSpec:
    """Read a model string.

    Raises:
        RecipeSyntaxError: where it cannot be read, with a caret under the place.
        RecipeError: where it can be read but not merged (see MergeSpec.create).
    """
    parser = _Parser(text)
    head = parser.take(_NAME, "an adapter's name or a method")
    if not parser.at("("):
        parser.position = 0
        return MergeSpec.create(default_method, parser.sum(end=""))
    call = _CALL.fullmatch(head)
    assert call is not None
    method, number = call["method"], call["number"]
    if method not in METHODS:
        raise RecipeSyntaxError(f"unknown method {shown(method)}{nearest(method, METHODS)}", text, text.index(head))
    options = _numbered(method, number) if number is not None else {}
    parser.expect("(")
    terms = parser.sum(end=")")
    parser.expect(")")
    parser.end()
    return MergeSpec.create(method, terms, options)


def parse_object(lora: Any, default_method: str) -> MergeSpec:
    """Read the body object `lora`.

    Raises:
        RequestError: naming the field at fault.
        RecipeError: where it can be read but not merged.
    """
    try:
        recipe = LoraObject.model_validate(lora)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["lora", *(str(part)[:_LONGEST_FIELD] for part in first["loc"])])
        raise RequestError(f"{where}: {first['msg'].lower()} (got {shown(first['input'])})", where) from error
    options = dict(recipe.options)
    method = default_method if recipe.method is None else recipe.method
    if recipe.rank is not None:
        if "rank" in options:
            raise RequestError("lora.rank and lora.options.rank are the same; give one", "lora.rank")
        options["rank"] = recipe.rank
    terms = [Term.of(adapter.name, adapter.weight) for adapter in recipe.adapters]
    return MergeSpec.create(method, terms, options)


def readable(spec: MergeSpec) -> str:
    """A spec as an expression, for people: options that an expression cannot say are left out, weights by module are `…`."""
    if len(spec.terms) == 1 and spec.method.name == "cat" and spec.terms[0] == Term(spec.terms[0].adapter):
        return spec.terms[0].adapter
    number = getattr(spec.options, spec.method.number) if spec.method.number else None
    return f"{spec.method.name}{'' if number is None else f'-{_digits(number)}'}({readable_sum(spec)})"


def readable_sum(spec: MergeSpec) -> str:
    """The terms of a spec as an expression has them."""
    return "+".join(_readable_term(term) for term in spec.terms)


def _readable_term(term: Term) -> str:
    if term.by_module:
        return f"{term.adapter}*…"
    return term.adapter if term.weight == 1 else f"{term.adapter}*{_digits(term.weight)}"


def _digits(number: float) -> str:
    """A number so that the grammar reads the same one: all its digits, no exponent."""
    return f"{Decimal(repr(number)):f}".removesuffix(".0")


def _numbered(method: str, number: str) -> dict[str, Any]:
    name = METHODS[method].number
    if name is None:
        raise RecipeError(f"{method} takes no number; write {method}(…), not {method}-{number}(…)", "model")
    try:
        return {name: float(number) if "." in number else int(number)}
    except ValueError:  # Python reads no number of so many digits
        raise RecipeError(f"{name} {number[:12]}… of {method} has {len(number)} digits; use fewer", "model") from None


class _Parser:
    """A cursor over an expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def sum(self, end: str) -> list[Term]:
        """Terms up to `end` ("" for the end of the text), which is not consumed."""
        terms = []
        while True:
            name = self.take(_NAME, "an adapter's name")
            terms.append(Term(name, self.weight() if self.at("*") else 1.0))
            if not self.at("+"):
                break
            self.expect("+")
        if not end:
            self.end()
        return terms

    def weight(self) -> float:
        self.expect("*")
        return float(self.take(_WEIGHT, "a weight, such as 0.7 or -1"))

    def take(self, pattern: re.Pattern[str], wanted: str) -> str:
        self._skip()
        match = pattern.match(self.text, self.position)
        if match is None:
            raise RecipeSyntaxError(f"expected {wanted}", self.text, self.position)
        self.position = match.end()
        return match[0]

    def at(self, character: str) -> bool:
        self._skip()
        return self.text.startswith(character, self.position)

    def expect(self, character: str) -> None:
        if not self.at(character):
            raise RecipeSyntaxError(f"expected {character!r}", self.text, self.position)
        self.position += 1

    def end(self) -> None:
        self._skip()
        if self.position < len(self.text):
            raise RecipeSyntaxError("expected '+' or the end", self.text, self.position)

    def _skip(self) -> None:
        self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]  # always matches
