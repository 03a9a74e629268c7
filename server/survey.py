"""What the server has to know of an adapter: all of it is read and checked once, and only this is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from merging.peft_folder import CONFIG, WEIGHTS, read_adapter


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
    try:
        stats = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except (OSError, ValueError):  # reading it says what is wrong
        return survey_anew(folder)
    return _survey(folder, tuple((file.st_mtime_ns, file.st_size) for file in stats))


def survey_anew(folder: Path) -> Survey:
    """As `survey`, of what lies there now: times of files can be set back.

    Raises:
        AdapterError: see survey.
    """
    return _survey.__wrapped__(folder, ())


@cache
def _survey(folder: Path, _files: tuple[tuple[int, int], ...]) -> Survey:
    adapter = read_adapter(folder)
    modules = adapter.modules
    return Survey(
        adapter.digest,
        sum(module.a.nbytes + module.b.nbytes for module in modules.values()),
        adapter.base_model,
        {name: module.rank for name, module in modules.items()},
        {name: module.shape for name, module in modules.items()},
    )
