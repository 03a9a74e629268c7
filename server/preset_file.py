"""Preset files: a recipe as JSON, with the content digests of the adapters that it was made for.

    {"recipe": {"method": "cat", "adapters": [{"name": "math", "weight": {"model.layers.0.mlp.up_proj": 0.93, …}}, …]},
     "adapters": {"math": "5c0f…", …},
     "fit": {…how `loramix fit` came to it…}}

`recipe` is what a request gives as `lora`. The server holds adapters to the digests: weights learned for one content mean
nothing for another.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging import MergeSpec
from merging.errors import OutputError
from server.errors import ConfigError
from server.grammar import LoraObject, WeightedAdapter


class PresetFile(BaseModel):
    """What stands in a preset file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    recipe: LoraObject
    adapters: dict[str, str]
    """The digest of each adapter of the recipe."""
    fit: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, spec: MergeSpec, digests: Mapping[str, str], fit: dict[str, Any]) -> "PresetFile":
        """The file of a spec; options that are the defaults are left out."""
        return cls(recipe=lora_object(spec), adapters={term.adapter: digests[term.adapter] for term in spec.terms}, fit=fit)


def lora_object(spec: MergeSpec) -> LoraObject:
    """The body object that says the same as a spec; options that are the defaults are left out."""
    adapters = [WeightedAdapter(name=term.adapter, weight=term.plain_weight) for term in spec.terms]
    return LoraObject(method=spec.method.name, adapters=adapters, options=changed_options(spec))


def changed_options(spec: MergeSpec) -> dict[str, Any]:
    """The options of a spec that are not the method's defaults."""
    defaults = dataclasses.asdict(spec.method.options())
    return {name: value for name, value in dataclasses.asdict(spec.options).items() if value != defaults[name]}


def names_file(recipe: str) -> bool:
    """Whether what a preset is given is the path of a file, and no expression."""
    return recipe.endswith(".json")


def read_preset_file(path: Path) -> PresetFile:
    """Read and check a file; whether the adapters are there is for the catalog to say. Raises ConfigError."""
    try:
        preset = PresetFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"preset file {path} cannot be read ({error.strerror or error}); `loramix fit` writes one") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is no preset file: {where + ': ' if where else ''}{first['msg'].lower()}") from error
    for adapter in preset.recipe.adapters:
        if adapter.name not in preset.adapters:
            raise ConfigError(f"{path} is no preset file: adapters has no digest of {adapter.name!r}")
    return preset


def save_preset_file(preset: PresetFile, path: Path) -> None:
    """Write a file, all of it or nothing; equal presets give equal bytes. Raises OutputError."""
    text = preset.model_dump_json(indent=1, exclude_defaults=True) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
