"""What admins change while the server runs, put together at its start."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from server.adapters import Adapters
from server.allowed import Allowed
from server.cache import Cache
from server.catalog import Catalog
from server.composer import Composer
from server.config import Settings
from server.engine import Engine
from server.kept import Kept
from server.kept_watch import KeptWatch
from server.preset_index import PresetIndex
from server.presets import read_presets

logger = logging.getLogger("vllm.loramix")  # below vLLM's logger, so that lines look and go like its own


@dataclass(frozen=True)
class Admin:
    """The adapters, presets and merged adapters of a running server."""

    adapters: Adapters
    presets: PresetIndex
    cache: Cache
    watch: KeptWatch

    @classmethod
    def open(cls, settings: Settings, catalog: Catalog, composer: Composer, engine: Engine) -> "Admin":
        """With the command line's adapters, which are in the catalog, its presets, and what was kept beside them.

        What was kept and is not there any more, or not the same, is logged and left out.

        Raises:
            ConfigError: for a preset that cannot be served, or a state folder that cannot be used.
        """
        kept = Kept(settings.state_dir)
        given = read_presets(settings.presets, catalog, settings.default_method)
        presets = PresetIndex(given, catalog, settings.default_method, kept, composer.metrics)
        cache = Cache(composer, engine)
        adapters = Adapters(catalog, presets, cache, Allowed.by(settings), kept, composer.metrics)
        adapters.restore()
        presets.restore()
        _warn("adapter", adapters.skipped)
        _warn("preset", presets.skipped)
        return cls(adapters, presets, cache, KeptWatch(kept, adapters, presets))


def _warn(kind: str, skipped: Mapping[str, str]) -> None:
    for name, reason in skipped.items():
        logger.warning("%s %s, which was kept, is left out: %s", kind, name, reason)
