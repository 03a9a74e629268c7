"""An adapter that is to be added while the server runs: where it is wanted from, and reading it."""

import os
from dataclasses import dataclass
from pathlib import Path

from merging import AdapterError
from merging.peft_folder import CONFIG, WEIGHTS
from server.allowed import Allowed
from server.catalog import Catalog, CatalogEntry
from server.kept import KeptAdapter
from server.survey import Survey, survey_anew


@dataclass(frozen=True)
class Wanted:
    """From the folder `path`, or from `repo` on the Hub, at `revision`."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None

    def read(self, name: str, catalog: Catalog, allowed: Allowed, *, fetch: bool) -> tuple[CatalogEntry, KeptAdapter]:
        """The checked adapter, and where exactly it comes from. Adds nothing; may be called on any thread.

        Args:
            fetch: whether to ask the Hub; else its cache has to have it.

        Raises:
            ForbiddenError: where adapters may not be added from there.
            AdapterError: for one that cannot be used.
        """

        def look(folder: Path) -> Survey:
            _check_sizes(folder, catalog.model.most_bytes)
            return survey_anew(folder)

        if self.repo is not None:
            folder, commit = allowed.repository(name, self.repo, self.revision, fetch=fetch)
            entry = catalog.check(name, folder, look)
            return entry, KeptAdapter(repo=self.repo, revision=commit, digest=entry.source.digest)
        folder = allowed.folder(str(self.path))
        entry = catalog.check(name, folder, look)
        allowed.recheck(folder)  # what was allowed is what has been read
        return entry, KeptAdapter(path=str(folder), digest=entry.source.digest)


def _check_sizes(folder: Path, most: int) -> None:
    """That the files are small enough to be read into memory: none that fits the model is larger."""
    for name in (CONFIG, WEIGHTS):
        if os.path.isfile(folder / name) and (size := os.path.getsize(folder / name)) > most:
            raise AdapterError(
                f"adapter {folder}: {name} has {size} bytes, over the {most} of any adapter that fits this model and "
                "--max-lora-rank; check what it is"
            )
