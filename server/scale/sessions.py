"""What a request is routed by: equal meaning, equal session, and so one replica that has it merged already."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from merging import LoramixError, MergeSpec, Term
from server.asked import asked_spec
from server.errors import ConfigError
from server.grammar import parse_expression, parse_object
from server.preset_file import names_file, read_preset_file

NONE = ""
"""The session of what any replica answers as well as any other."""


class Sessions:
    """Names bodies by their meaning.

    A session is the content key of server/catalog.py with names in the place of content: all replicas read the same
    adapters, so names tell apart what content does, and no adapter has to be read here.

    Args:
        base_models: the names of the base model, as served.
        default_method: merges a sum that names no method.
        presets: NAME -> expression, or the path of a preset file. One that is not known here has its name's own session.

    Raises:
        ConfigError: for a preset that cannot be read.
    """

    def __init__(self, base_models: Sequence[str], default_method: str, presets: Mapping[str, str]) -> None:
        self._base_models = base_models
        self._default_method = default_method
        self._presets = {name: _read(name, recipe, default_method) for name, recipe in presets.items()}

    def of(self, body: bytes) -> str:
        """The session of a request's body; NONE for the base model, and for what a replica will refuse."""
        try:
            payload = json.loads(body)
            if not isinstance(payload, dict):
                return NONE
            spec = asked_spec(payload, self._base_models, self._default_method, self._named)
        except (ValueError, RecursionError, LoramixError):  # the replica says what is wrong with it
            return NONE
        return NONE if spec is None else spec.key({term.adapter: term.adapter for term in spec.terms}, dtype="")

    def _named(self, name: str) -> MergeSpec:
        return self._presets.get(name) or MergeSpec.create("cat", [Term(name)])


def _read(name: str, recipe: str, default_method: str) -> MergeSpec:
    try:
        if names_file(recipe):
            return parse_object(read_preset_file(Path(recipe)).recipe, default_method)
        return parse_expression(recipe, default_method)
    except LoramixError as error:
        raise ConfigError(f"preset {name!r}: {error}") from error
