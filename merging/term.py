"""One adapter of a recipe, with its weight: one number, or a number for each module by patterns of its name."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import takewhile

from merging.errors import RecipeError, nearest, shown

WEIGHT_DECIMALS = 4
WILD = frozenset("*?[")  # characters that make a pattern more than a name
_LARGEST = 1e4  # beyond any use; what is far larger no dtype holds
REST = "*"  # the pattern of all modules that no pattern before it matches


@dataclass(frozen=True)
class Term:
    """One adapter of a recipe, by name, with its weight.

    Attributes:
        weight: of every module that no pattern of `by_module` matches.
        by_module: (pattern, weight) pairs; the first pattern (shell style, as fnmatch) that matches a module's name decides.
    """

    adapter: str
    weight: float = 1.0
    by_module: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, adapter: str, weight: float | Mapping[str, float]) -> "Term":
        """A term from plain (JSON) values: a weight, or weights by pattern, such as `{"*.q_proj": 0.5, "*": 1.0}`."""
        if not isinstance(weight, Mapping):
            return cls(adapter, weight)
        patterns = list(weight)
        counted = patterns[: patterns.index(REST)] if REST in patterns else patterns
        return cls(adapter, weight.get(REST, 1.0), tuple((pattern, weight[pattern]) for pattern in counted))

    @property
    def plain_weight(self) -> float | dict[str, float]:
        """The weight as plain (JSON) values, from which `of` makes the term again."""
        return {**dict(self.by_module), REST: self.weight} if self.by_module else self.weight

    def at(self, module: str) -> float:
        """The weight at one module."""
        place = self._place(module) if self.by_module else None
        return self.weight if place is None else self.by_module[place][1]

    def _place(self, module: str) -> int | None:
        """Place of the pattern that decides about a module."""
        if module not in self._places:
            matching = (place for place, (pattern, _) in enumerate(self.by_module) if fnmatchcase(module, pattern))
            self._places[module] = next(matching, None)
        return self._places[module]

    @cached_property
    def _places(self) -> dict[str, int | None]:
        """Places found so far. Names before any wider pattern need no search: learned weights name hundreds of modules."""
        names = takewhile(lambda place: WILD.isdisjoint(self.by_module[place][0]), range(len(self.by_module)))
        return {self.by_module[place][0]: place for place in reversed(list(names))}  # of equal names the first decides

    def canonical(self) -> "Term":
        """The same, weights rounded to 1e-4, without patterns that change nothing. Raises RecipeError for a bad weight."""
        default = _rounded(self.weight, f"weight {shown(self.weight)} of {shown(self.adapter)}")
        by_module = [(p, _rounded(w, f"weight {shown(w)} of {shown(self.adapter)} at {shown(p)}")) for p, w in self.by_module]
        while by_module and by_module[-1][1] == default:
            by_module.pop()
        return Term(self.adapter, default, tuple(by_module))

    def check(self, modules: Collection[str]) -> None:
        """Raise RecipeError where a pattern matches none of `modules`, the adapter's."""
        decisive = {self._place(module) for module in modules} if self.by_module else set()
        for place, (pattern, _) in enumerate(self.by_module):
            if place not in decisive and not any(fnmatchcase(module, pattern) for module in modules):
                known = {f"*.{module.rpartition('.')[2]}" for module in modules}.union(modules)
                hint = nearest(pattern, known) or f"; it has *.{next(iter(modules)).rpartition('.')[2]} and others"
                raise RecipeError(f"weight pattern {shown(pattern)} matches no module of {self.adapter!r}{hint}", "weight")


def _rounded(weight: float, what: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < math.inf:
        raise RecipeError(f"{what} is not a finite number", "weight")
    if abs(weight) > _LARGEST:
        raise RecipeError(f"{what} is over {_LARGEST:g} in size; use {_LARGEST:g} at most", "weight")
    return round(float(weight), WEIGHT_DECIMALS) + 0.0  # + 0.0 turns −0 into the 0 that it equals
