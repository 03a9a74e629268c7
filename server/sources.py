"""Where adapters come from: folders of PEFT folders, single folders, and the Hub."""

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from merging import AdapterError
from merging.peft_folder import CONFIG, WEIGHTS
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
        return hub_folder(name, source)
    except AdapterError as error:
        raise AdapterError(f"{error}; nor is {source} a folder here") from error


def hub_folder(name: str, repository: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """Where the Hub's cache has an adapter of the repository ORG/REPO; its last part is the commit.

    Args:
        name: of the adapter, for the error.
        revision: commit, branch or tag; None for what the Hub shows.
        fetch: whether to ask the Hub; else it has to be in the cache.

    Raises:
        AdapterError: where it cannot be had.
    """
    try:
        files = [CONFIG, WEIGHTS]
        folder = snapshot_download(repository, revision=revision, allow_patterns=files, local_files_only=not fetch)
    except Exception as error:  # those of its HTTP library come through, and each version has another
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"adapter {name!r}: the Hub did not give {repository} ({reason})") from error
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise AdapterError(f"adapter {name!r}: {repository} on the Hub has no {CONFIG}; name one that PEFT has pushed")
    return Path(folder)
