"""The catalog: which adapters there are, and what a spec means in terms of their content.

An adapter's name exists only once the whole adapter has been checked. Its factors are not kept here: the worker
reads them when a merge needs them, and holds them to the digest seen at the check.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merging import DTYPES, AdapterError, MergeSpec, check_rank
from merging.errors import nearest, shown
from merging.spec import MAX_TERMS
from server.caller import ANYONE, Caller
from server.errors import LimitError, UnknownModelError
from server.grammar import is_name, readable, readable_sum
from server.survey import Survey, survey

KEY_PREFIX = 12  # characters of the content key in an engine name: 48 bits


@dataclass(frozen=True)
class Source:
    """A source adapter of a recipe: where its content lies, which content it must be, and the bytes of its factors."""

    name: str
    path: Path
    digest: str
    nbytes: int


@dataclass(frozen=True)
class CatalogEntry:
    """A checked adapter: its source, the rank of each of its modules, and d_out + d_in of all of them together."""

    source: Source
    ranks: Mapping[str, int]
    width: int


@dataclass(frozen=True)
class Recipe:
    """A spec whose adapters are known: what the engine is asked to build.

    Attributes:
        key: content key (see MergeSpec.key).
        sources: of the spec's terms, in their order.
        nbytes: about what the merged adapter takes up.
    """

    spec: MergeSpec
    key: str
    sources: tuple[Source, ...]
    nbytes: int

    @property
    def name(self) -> str:
        """The engine's name for it. Holds the key, so two versions never share prefix-cache blocks."""
        return f"{readable(self.spec)}@{self.key[:KEY_PREFIX]}"


class Catalog:
    """Adapters by name.

    Args:
        modules: (d_out, d_in) by module name, as the engine's model has them.
        max_rank: the engine's limit on a merged adapter's rank.
        dtype: the engine's LoRA dtype by torch's name.
        reserved: names that no adapter may take (the base model's).
        max_adapters: adapters in one recipe at most.
    """

    def __init__(
        self,
        modules: Mapping[str, tuple[int, int]],
        max_rank: int,
        dtype: str,
        reserved: frozenset[str],
        max_adapters: int = MAX_TERMS,
    ) -> None:
        self._modules = modules
        self._max_rank = max_rank
        self._dtype = dtype
        self._reserved = reserved
        self._max_adapters = max_adapters
        self._entries: dict[str, CatalogEntry] = {}

    @property
    def entries(self) -> Mapping[str, CatalogEntry]:
        return self._entries

    def add(self, name: str, path: Path) -> None:
        """Check the PEFT folder `path` against the model, whole, and add it as `name`.

        Raises:
            AdapterError: naming the adapter, the reason and the remedy.
        """
        if not is_name(name):
            raise AdapterError(f"adapter name {name!r}: use letters, digits, '.', '_' and '-' only")
        if name in self._entries or name in self._reserved:
            raise AdapterError(f"adapter name {name!r} is taken; give {path} another with --adapter NAME=PATH")
        found = survey(path)
        try:
            self._check(found)
        except AdapterError as error:
            raise AdapterError(f"adapter {path}: {error}") from None
        self._entries[name] = CatalogEntry(
            Source(name, path.resolve(), found.digest, found.nbytes), found.ranks, sum(map(sum, found.shapes.values()))
        )

    def resolve(self, spec: MergeSpec, caller: Caller = ANYONE) -> Recipe:
        """What `spec` means today. An adapter that `caller` may not use is as one that is not there.

        Raises:
            UnknownModelError: naming the adapter and the nearest names that the caller may use.
            LimitError: where it has more adapters than this server merges, or would not fit the engine, with the remedies.
            RecipeError: where the method cannot merge these adapters.
        """
        if len(spec.terms) > self._max_adapters:
            raise LimitError(
                f"{len(spec.terms)} adapters in one recipe, over this server's {self._max_adapters}; use fewer, "
                f"or start it with --max-adapters-per-recipe {len(spec.terms)} or more",
                "adapters",
            )
        for term in spec.terms:
            if term.adapter not in self._entries or not caller.may_use(term.adapter):
                usable = list(filter(caller.may_use, self._entries))
                raise UnknownModelError(f"no adapter {shown(term.adapter)} here{nearest(term.adapter, usable)}")
        entries = {term.adapter: self._entries[term.adapter] for term in spec.terms}
        rank = check_rank(spec, {name: entry.ranks for name, entry in entries.items()})
        if rank > self._max_rank:
            fitting = f"svd-{self._max_rank}({readable_sum(spec)})"
            raise LimitError(
                f"{readable(spec)} has rank {rank}, over this server's {self._max_rank}; use {fitting}, "
                f"the nearest of that rank, or start the server with --max-lora-rank {rank} or more",
                "rank",
            )
        key = spec.key({name: entry.source.digest for name, entry in entries.items()}, self._dtype)
        nbytes = rank * max(entry.width for entry in entries.values()) * DTYPES[self._dtype].itemsize
        return Recipe(spec, key, tuple(entries[term.adapter].source for term in spec.terms), nbytes)

    def _check(self, adapter: Survey) -> None:
        trained_on = adapter.base_model or "another base model"
        unknown = [name for name in adapter.shapes if name not in self._modules]
        if len(unknown) == len(adapter.shapes):
            raise AdapterError(
                f"none of its {len(unknown)} modules ({unknown[0]}, …) is one that this model can adapt, "
                f"so it would have no effect; it was trained on {trained_on}"
            )
        if unknown:
            raise AdapterError(
                f"{unknown[0]} and {len(unknown) - 1} more of its modules are none that this model can adapt; train it without"
            )
        for name, shape in adapter.shapes.items():
            if shape != tuple(self._modules[name]):
                raise AdapterError(
                    f"{name} is {shape}, but {tuple(self._modules[name])} in this model: it was trained on {trained_on}; "
                    "serve that one"
                )
        if adapter.rank > self._max_rank:
            raise AdapterError(
                f"rank {adapter.rank} is over this server's {self._max_rank}; "
                f"start it with --max-lora-rank {adapter.rank} or more"
            )
