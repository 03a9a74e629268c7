"""Where adapters may be added from while the server runs: below some folders, and from some repositories on the Hub."""

import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from merging import AdapterError
from merging.errors import shown
from merging.peft_folder import CONFIG, WEIGHTS
from server.config import Settings
from server.errors import ForbiddenError
from server.sources import hub_folder


class Allowed:
    """The places. Links are followed first and judged by where they end, so none leads out.

    Args:
        roots: folders; what these are links to is settled now.
        repositories: patterns of ORG/REPO (fnmatch, case counts).
    """

    def __init__(self, roots: Iterable[Path], repositories: Sequence[str]) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._repositories = repositories

    @classmethod
    def by(cls, settings: Settings) -> "Allowed":
        """Below the folders that were given with --adapters, and what is allowed beside them."""
        return cls([*settings.adapters, *settings.adapter_root], settings.hub_allow)

    def folder(self, path: str) -> Path:
        """The real folder of `path`, which is absolute, or relative to a root: the first that has it.

        Raises:
            ForbiddenError: where it, or a file in it that would be read, is not below a root, be it there or not.
            AdapterError: where it is below one, and not there.
        """
        real = [Path(os.path.realpath(root / path)) for root in self._roots]
        inside = [folder for folder in real if self._has(folder)]
        folder = next((folder for folder in inside if os.path.isdir(folder)), None)
        if folder is not None:
            self.recheck(folder)
            return folder
        if real and inside == real:
            raise AdapterError(f"{shown(path)}: no such folder below --adapters and --adapter-root; check the path")
        raise ForbiddenError(
            f"{shown(path)} is not below a folder from which adapters may be added; move it below one of --adapters and "
            "--adapter-root, or start the server with another --adapter-root"
        )

    def recheck(self, folder: Path) -> None:
        """That a folder of `folder`, and its files, still are where they were. Raises ForbiddenError."""
        for name in ("", CONFIG, WEIGHTS):
            real = Path(os.path.realpath(folder / name))
            if not self._has(real) or (not name and real != folder):
                raise ForbiddenError(
                    f"{folder / name} is a link that leads out of the folders from which adapters may be added; "
                    "put the adapter itself there"
                )

    def repository(self, name: str, repository: str, revision: str | None, *, fetch: bool) -> tuple[Path, str]:
        """The folder of ORG/REPO as it lies in the Hub's cache, and the commit that this is.

        Args:
            name: of the adapter, for errors.
            revision: commit, branch or tag; None for what the Hub shows.
            fetch: whether to ask the Hub; else it has to be in the cache.

        Raises:
            ForbiddenError: where no pattern allows it.
            AdapterError: where it cannot be had.
        """
        if not any(fnmatchcase(repository, pattern) for pattern in self._repositories):
            raise ForbiddenError(
                f"repository {shown(repository)} is none from which adapters may be added; start the server with "
                "--hub-allow ORG/REPO, or a pattern of such"
            )
        folder = hub_folder(name, repository, revision, fetch=fetch)
        return folder, folder.name

    def _has(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)
