"""Presets: recipes with a name."""

from collections.abc import Mapping
from pathlib import Path

from merging import LoramixError, MergeSpec
from server.catalog import Catalog
from server.errors import ConfigError
from server.grammar import is_name, parse_expression, parse_object
from server.preset_file import names_file, read_preset_file

_SHOWN = 12  # characters of a digest that people compare


def read_presets(recipes: Mapping[str, str], catalog: Catalog, default_method: str) -> dict[str, MergeSpec]:
    """Presets from NAME -> expression, or the path of a preset file; each checked against the catalog.

    Raises:
        ConfigError: naming the preset and what is wrong with it.
    """
    presets: dict[str, MergeSpec] = {}
    for name, recipe in recipes.items():
        if not is_name(name) or name in catalog.entries:
            raise ConfigError(
                f"preset name {name!r} is taken by an adapter, or uses more than letters, digits, '.', '_' and '-'"
            )
        try:
            presets[name] = _read(recipe, catalog, default_method)
        except LoramixError as error:
            raise ConfigError(f"preset {name!r}: {error}") from error
    return presets


def _read(recipe: str, catalog: Catalog, default_method: str) -> MergeSpec:
    if not names_file(recipe):
        spec = parse_expression(recipe, default_method)
        catalog.resolve(spec)
        return spec
    preset = read_preset_file(Path(recipe))
    spec = parse_object(preset.recipe, default_method)
    for source in catalog.resolve(spec).sources:
        made_for = preset.adapters[source.name]
        if source.digest != made_for:
            raise ConfigError(
                f"{recipe} was made for another content of adapter {source.name!r} (digest {made_for[:_SHOWN]}, "
                f"here {source.digest[:_SHOWN]}); serve that one, or run loramix fit again"
            )
    return spec
