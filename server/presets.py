"""Presets: recipes with a name, as the command line, files and requests have them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging import LoramixError, MergeSpec, RecipeError
from server.catalog import Catalog
from server.errors import ConfigError
from server.grammar import is_name, parse_expression, parse_object
from server.preset_file import PresetFile, names_file, read_preset_file

_SHOWN = 12  # characters of a digest that people compare


@dataclass(frozen=True)
class Preset:
    """A recipe that can be asked for by name.

    Attributes:
        made_for: digests of its adapters by name, where it is meant for that content alone; else it follows the names.
        fit: how `loramix fit` came to it.
        given: whether it is the command line's: then that has its name again at the next start.
        kept: whether it is in the state folder.
    """

    spec: MergeSpec
    made_for: Mapping[str, str] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False
    kept: bool = False


def read_presets(recipes: Mapping[str, str], catalog: Catalog, default_method: str) -> dict[str, Preset]:
    """Presets from NAME -> expression, or the path of a preset file; each checked against the catalog.

    Raises:
        ConfigError: naming the preset and what is wrong with it.
    """
    presets: dict[str, Preset] = {}
    for name, recipe in recipes.items():
        if not is_name(name) or name in catalog.entries or name in catalog.reserved:
            raise ConfigError(
                f"preset name {name!r} is taken by an adapter or the base model, or uses more than letters, digits, "
                "'.', '_' and '-'"
            )
        try:
            if names_file(recipe):
                presets[name] = read_preset(read_preset_file(Path(recipe)), catalog, default_method, given=True)
            else:
                spec = parse_expression(recipe, default_method)
                catalog.resolve(spec)
                presets[name] = Preset(spec, given=True)
        except LoramixError as error:
            raise ConfigError(f"preset {name!r}: {error}") from error
    return presets


def read_preset(file: PresetFile, catalog: Catalog, default_method: str, **where: bool) -> Preset:
    """The preset of a file's content, checked against the catalog.

    Raises:
        RecipeError: where it was made for other content than the catalog has.
        LoramixError: what is wrong with the recipe.
    """
    spec = parse_object(file.recipe, default_method)
    for source in catalog.resolve(spec).sources:
        made_for = file.adapters.get(source.name, source.digest)
        if source.digest != made_for:
            raise RecipeError(
                f"it was made for another content of adapter {source.name!r} (digest {made_for[:_SHOWN]}, "
                f"here {source.digest[:_SHOWN]}); serve that one, or run loramix fit again",
                "adapters",
            )
    return Preset(spec, file.adapters, file.fit, **where)
