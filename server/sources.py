"""Where adapters come from: folders of PEFT folders, single folders, and the Hub."""

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from merging import AdapterError
from server.config import Settings
from server.errors import ConfigError


def adapter_folders(settings: Settings) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every adapter that the settings name; the folders are not looked into.

    Raises:
        ConfigError: for an adapters folder that is not there.
        AdapterError: for a Hub repository that cannot be had.
    """
    for root in settings.adapters:
        if not root.is_dir():
            raise ConfigError(
                f"adapters folder {root} does not exist; --adapters takes a folder whose subfolders are PEFT adapters"
            )
        yield from ((path.name, path) for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith("."))
    for name, source in settings.adapter.items():
        yield name, _local(name, source)


def _local(name: str, source: str) -> Path:
    """The folder of a single adapter; ORG/REPO is fetched from the Hub unless a folder of that name is there."""
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for a user who is not there, and is_dir for a long path
    if os.path.isdir(path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        return path
    try:
        return Path(snapshot_download(source, allow_patterns=["adapter_config.json", "adapter_model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(f"adapter {name!r}: {source} is no folder here, and the Hub did not give it ({reason})") from error
