"""What the server has to know of an adapter: all of it is read and checked once, and only this is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from merging.peft_folder import read_adapter


@dataclass(frozen=True)
class Survey:
    """A checked adapter without its factors.

    Attributes:
        digest: of its content. nbytes: of its factors.
        base_model: the name of the base model that it says it was trained on, if it says.
        ranks: by module. shapes: (d_out, d_in) by module.
    """

    digest: str
    nbytes: int
    base_model: str | None
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(self.ranks.values())


def survey(folder: Path) -> Survey:
    """Check the PEFT folder, whole. `loramix serve` asks before the model is loaded and again once it is; it is read once.

    Raises:
        AdapterError: see read_adapter.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return _survey(folder, tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@cache
def _survey(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Survey:
    adapter = read_adapter(folder)
    modules = adapter.modules
    return Survey(
        adapter.digest,
        sum(module.a.nbytes + module.b.nbytes for module in modules.values()),
        adapter.base_model,
        {name: module.rank for name, module in modules.items()},
        {name: module.shape for name, module in modules.items()},
    )
