"""The catalog: which adapters there are, and what a spec means in terms of their content.

An adapter's name exists only once the whole adapter has been checked. Its factors are not kept here: the worker
reads them when a merge needs them, and holds them to the digest seen at the check.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from merging import DTYPES, AdapterError, MergeSpec, check_rank
from merging.errors import nearest, shown
from merging.spec import MAX_TERMS
from server.adaptable import Adaptable
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
    """A checked adapter.

    Attributes:
        base_model: that it says it was trained on, if it says.
        ranks: by module. width: d_out + d_in of all modules together.
    """

    source: Source
    base_model: str | None
    ranks: Mapping[str, int]
    width: int

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())


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
    """Adapters by name. `check` may be called on any thread, all else on the event loop alone.

    Args:
        modules: (d_out, d_in) by module name, as the engine's model has them.
        max_rank: the engine's limit on a merged adapter's rank.
        dtype: the engine's LoRA dtype by torch's name.
        reserved: names that no adapter may take (the base model's).
        max_adapters: adapters in one recipe at most.

    Attributes:
        model: what it can adapt. reserved: as given.
    """

    def __init__(
        self,
        modules: Mapping[str, tuple[int, int]],
        max_rank: int,
        dtype: str,
        reserved: frozenset[str],
        max_adapters: int = MAX_TERMS,
    ) -> None:
        self.model = Adaptable(modules, max_rank)
        self._dtype = dtype
        self.reserved = reserved
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
        if name in self._entries or name in self.reserved:
            raise AdapterError(f"adapter name {name!r} is taken; give {path} another with --adapter NAME=PATH")
        self.put(self.check(name, path, survey))

    def check(self, name: str, path: Path, look: Callable[[Path], Survey]) -> CatalogEntry:
        """The PEFT folder `path`, checked against the model, whole, as the adapter `name`; it is not added.

        Raises:
            AdapterError: naming the adapter, the reason and the remedy.
        """
        found = look(path)
        try:
            self.model.check(found)
        except AdapterError as error:
            raise AdapterError(f"adapter {path}: {error}") from None
        source = Source(name, path.resolve(), found.digest, found.nbytes)
        return CatalogEntry(source, found.base_model, found.ranks, sum(map(sum, found.shapes.values())))

    def put(self, entry: CatalogEntry) -> None:
        """Have its name mean this adapter from now on."""
        self._entries[entry.source.name] = entry

    def remove(self, name: str) -> None:
        """Have the name mean nothing from now on."""
        del self._entries[name]

    def has(self, digest: str) -> bool:
        """Whether any name means this content."""
        return any(entry.source.digest == digest for entry in self._entries.values())

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
        if rank > self.model.max_rank:
            fitting = f"svd-{self.model.max_rank}({readable_sum(spec)})"
            raise LimitError(
                f"{readable(spec)} has rank {rank}, over this server's {self.model.max_rank}; use {fitting}, "
                f"the nearest of that rank, or start the server with --max-lora-rank {rank} or more",
                "rank",
            )
        key = spec.key({name: entry.source.digest for name, entry in entries.items()}, self._dtype)
        nbytes = rank * max(entry.width for entry in entries.values()) * DTYPES[self._dtype].itemsize
        return Recipe(spec, key, tuple(entries[term.adapter].source for term in spec.terms), nbytes)
