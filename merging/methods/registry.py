"""What a merge method is, and the decorator that registers one.

A method never touches the factors themselves. It looks at a Pool (all modules whose adapters have the same
ranks) and answers with an assembly: which units, which mixtures of units, or which function of
entries the merged adapter is made of.
"""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.assembly import Assembly
from merging.errors import RecipeError, nearest, shown
from merging.pool import Pool

METHODS: dict[str, "Method"] = {}


@dataclass(frozen=True)
class Options:
    """Options of a method: a frozen dataclass of simple values that checks itself in __post_init__."""


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes:
        name: as recipes write it.
        version: counts changes of the result; part of every content key.
        number: the option that the NUMBER of `METHOD-NUMBER(…)` sets, if the method takes one.
        options: the class of its options.
        rank: (ranks of the adapters in a module, options) -> rank of the merged module; raises RecipeError
            where the method cannot merge such ranks.
        assemble: (units, options) -> assembly.
    """

    name: str
    version: int
    number: str | None
    options: type[Options]
    rank: Callable[[Sequence[int], Any], int]
    assemble: Callable[[Pool, Any], Assembly]

    def parse_options(self, given: Mapping[str, Any]) -> Options:
        """Options from plain values; unknown names and values of a wrong type raise RecipeError."""
        fields = {f.name: typing.get_type_hints(self.options)[f.name] for f in dataclasses.fields(self.options)}
        for name, value in given.items():
            if name not in fields:
                hint = nearest(name, fields) if fields else "; it takes none"
                raise RecipeError(f"{self.name} has no option {shown(name)}{hint}", "options")
            if not _is_of(value, fields[name]):
                raise RecipeError(f"{name}={shown(value)} of {self.name} should be {_describe(fields[name])}", name)
        return self.options(**{name: float(value) if fields[name] is float else value for name, value in given.items()})


def method(
    name: str, *, version: int, options: type[Options], rank: Callable[[Sequence[int], Any], int], number: str | None = None
) -> Callable[[Callable[..., Assembly]], Callable[..., Assembly]]:
    """Register the decorated function as the merge method `name`; it must take (pool, options)."""

    def register(assemble: Callable[..., Assembly]) -> Callable[..., Assembly]:
        if list(inspect.signature(assemble).parameters) != ["pool", "options"]:
            raise TypeError(f"method {name}: the function must take (pool, options)")
        if number is not None and number not in {f.name for f in dataclasses.fields(options)}:
            raise TypeError(f"method {name}: number={number!r} is none of its options")
        if name in METHODS:
            raise TypeError(f"method {name} is registered already")
        METHODS[name] = Method(name, version, number, options, rank, assemble)
        return assemble

    return register


def _is_of(value: object, hint: Any) -> bool:
    """Whether a plain (JSON) value fits a type hint: a simple type, a Literal, or a union of those."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_args(hint):
        return any(_is_of(value, arg) for arg in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    """A type hint in words, for people who send JSON."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_args(hint):
        return " or ".join(map(_describe, typing.get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words.get(hint, str(hint))
