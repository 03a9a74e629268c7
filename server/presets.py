"""Presets: recipes with a name."""

from collections.abc import Mapping

from merging import LoramixError, MergeSpec
from server.catalog import Catalog
from server.errors import ConfigError
from server.grammar import is_name, parse_expression


def read_presets(recipes: Mapping[str, str], catalog: Catalog, default_method: str) -> dict[str, MergeSpec]:
    """Presets from NAME -> expression, each checked against the catalog.

    Raises:
        ConfigError: naming the preset and what is wrong with it.
    """
    presets: dict[str, MergeSpec] = {}
    for name, expression in recipes.items():
        if not is_name(name) or name in catalog.entries:
            raise ConfigError(
                f"preset name {name!r} is taken by an adapter, or uses more than letters, digits, '.', '_' and '-'"
            )
        try:
            presets[name] = parse_expression(expression, default_method)
            catalog.resolve(presets[name])
        except LoramixError as error:
            raise ConfigError(f"preset {name!r}: {error}") from error
    return presets
