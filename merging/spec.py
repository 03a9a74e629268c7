"""MergeSpec: what to merge, and how; its canonical form and content key.

Two recipes that mean the same have the same key, and so share one merged adapter: the order of adapters,
spelled-out defaults and differences of a weight below 1e-4 do not count; the adapters' content, the method's
version and the output dtype do.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.errors import RecipeError, nearest, shown
from merging.methods import METHODS, Method, Options
from merging.term import Term

MAX_TERMS = 16


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """A checked recipe. Build it with `MergeSpec.create`.

    Attributes:
        method: the merge method.
        terms: the adapters, sorted by name, with weights rounded to 1e-4; none has weight 0 everywhere, no name stands twice.
        options: the method's own options, defaults filled in.
    """

    method: Method
    terms: tuple[Term, ...]
    options: Options

    @classmethod
    def create(cls, method: str, terms: Sequence[Term], options: Mapping[str, Any] | None = None) -> "MergeSpec":
        """Check a recipe. A term of weight 0 is dropped: it means the same as an absent one.

        Raises:
            RecipeError: for an unknown method or option, a name twice, a weight that is not finite,
                no terms, too many, or none that counts.
        """
        known = METHODS.get(method)
        if known is None:
            raise RecipeError(f"unknown method {shown(method)}{nearest(method, METHODS)}", "method")
        if not 1 <= len(terms) <= MAX_TERMS:
            raise RecipeError(f"{len(terms)} adapters in one recipe; use 1 to {MAX_TERMS}", "adapters")
        kept: dict[str, Term] = {}
        for term in terms:
            if term.adapter in kept:
                raise RecipeError(f"{shown(term.adapter)} stands twice; give it once, with one weight", "adapters")
            kept[term.adapter] = term.canonical()
        counted = tuple(kept[name] for name in sorted(kept) if kept[name].weight != 0 or kept[name].by_module)
        if not counted:
            raise RecipeError("every weight is 0 (after rounding to 1e-4); name the base model instead", "weight")
        return cls(known, counted, known.parse_options(options or {}))

    def key(self, digests: Mapping[str, str], dtype: str) -> str:
        """The content key: sha256 (hex) of the canonical form.

        Args:
            digests: content digest by adapter name.
            dtype: the output's dtype by torch's name, such as `bfloat16`.
        """
        canonical = {
            "method": [self.method.name, self.method.version],
            "terms": sorted([digests[term.adapter], term.weight, term.by_module] for term in self.terms),
            "options": dataclasses.asdict(self.options),
            "dtype": dtype,
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()
