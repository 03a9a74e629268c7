"""The presets of a running server: those given at start, and those added and deleted since."""

import asyncio
from collections.abc import Mapping
from typing import Any

from merging import LoramixError, MergeSpec
from merging.errors import shown
from server.catalog import Catalog
from server.errors import ConflictError, NotFoundError, RequestError
from server.grammar import LoraObject, parse_expression, parse_object
from server.kept import Kept
from server.metrics import Metrics
from server.preset_file import PresetFile, lora_object
from server.presets import Preset, read_preset

MOST = 10_000
"""Presets at most; each is listed in /v1/models."""


class PresetIndex:
    """The presets of a running server; to be changed on its event loop.

    Args:
        given: on the command line.

    Attributes:
        specs: by name; changes as presets come and go.
        skipped: why presets that were kept are not there, by name.
    """

    def __init__(
        self, given: Mapping[str, Preset], catalog: Catalog, default_method: str, kept: Kept, metrics: Metrics
    ) -> None:
        self._catalog = catalog
        self._default_method = default_method
        self._kept = kept
        self._metrics = metrics
        self._given = frozenset(given)
        self._presets: dict[str, Preset] = {}
        self.specs: dict[str, MergeSpec] = {}
        self.skipped: dict[str, str] = {}
        for name, preset in given.items():
            self._put(name, preset)

    @property
    def all(self) -> Mapping[str, Preset]:
        return self._presets

    @property
    def kept(self) -> set[str]:
        """The names of those in the state folder."""
        return {name for name, preset in self._presets.items() if preset.kept}

    def restore(self) -> None:
        """Add what was kept, but for names that the command line or a kept adapter has, and for what cannot be served now."""
        for name, file in self._kept.presets.items():
            try:
                self._put_kept(name, file)
            except LoramixError as error:
                self.skipped[name] = str(error)

    async def learn(self, name: str) -> None:
        """Add, or replace, what another server has kept under this name since; what cannot be served is in `skipped`."""
        async with self._kept.changing:
            try:
                file = await asyncio.to_thread(self._kept.read, "presets", name)
                if isinstance(file, PresetFile):
                    self._put_kept(name, file)
            except LoramixError as error:
                self.skipped[name] = str(error)

    async def forget(self, name: str) -> None:
        """Remove what another server has deleted."""
        async with self._kept.changing:
            if not await self._kept.has("presets", name):
                self.skipped.pop(name, None)
                if name in self.kept:
                    self._drop(name)

    async def add(self, name: str, recipe: str | LoraObject, made_for: dict[str, str], fit: dict[str, Any]) -> bool:
        """Have `name` mean `recipe` from now on; whether it is new.

        Raises:
            ConflictError: for a name that an adapter or the base model has, and where there are too many.
            StateError: where it cannot be kept.
            LoramixError: what is wrong with the recipe.
        """
        async with self._kept.changing:
            self._refuse_taken(name)
            if name not in self._presets and len(self._presets) >= MOST:
                raise ConflictError(f"there are {MOST} presets, which is the most; delete some")
            spec = self._spec_of(recipe)
            missing = [term.adapter for term in spec.terms if made_for and term.adapter not in made_for]
            if missing:
                raise RequestError(
                    f"adapters has no digest of {missing[0]!r}; give those of all adapters, or of none", "adapters"
                )
            file = PresetFile(recipe=lora_object(spec), adapters=made_for, fit=fit)
            preset = read_preset(file, self._catalog, self._default_method)
            kept = name not in self._given and await self._kept.write("presets", name, file)
            new = name not in self._presets
            self._put(name, Preset(spec, preset.made_for, fit, given=name in self._given, kept=kept))
            return new

    async def remove(self, name: str) -> None:
        """Raises NotFoundError, StateError."""
        async with self._kept.changing:
            if name not in self._presets and name not in self.skipped:
                raise NotFoundError(f"no preset {shown(name)} here; GET /v1/lora/presets lists them")
            await self._kept.remove("presets", name)
            self._drop(name)
            self.skipped.pop(name, None)

    def using(self, adapter: str) -> list[str]:
        """The names of presets with this adapter in them."""
        return [name for name, spec in self.specs.items() if any(term.adapter == adapter for term in spec.terms)]

    def made_for_other(self, adapter: str, digest: str) -> list[str]:
        """The names of presets that are meant for another content of this adapter."""
        return [name for name, preset in self._presets.items() if preset.made_for.get(adapter, digest) != digest]

    def _drop(self, name: str) -> None:
        self._presets.pop(name, None)
        self.specs.pop(name, None)
        self._metrics.presets.set(len(self._presets))

    def _spec_of(self, recipe: str | LoraObject) -> MergeSpec:
        if isinstance(recipe, str):
            return parse_expression(recipe, self._default_method)
        return parse_object(recipe, self._default_method)

    def _refuse_taken(self, name: str) -> None:
        if name in self._catalog.entries or name in self._catalog.reserved:
            raise ConflictError(f"{shown(name)} is the name of an adapter or of the base model; choose another")

    def _put_kept(self, name: str, file: PresetFile) -> None:
        """Add, or replace, what is kept. Raises LoramixError where it cannot be served here."""
        if name in self._given:
            raise ConflictError("the command line has a preset of this name")
        self._refuse_taken(name)
        self._put(name, read_preset(file, self._catalog, self._default_method, kept=True))

    def _put(self, name: str, preset: Preset) -> None:
        self._presets[name], self.specs[name] = preset, preset.spec
        self.skipped.pop(name, None)
        self._metrics.presets.set(len(self._presets))
