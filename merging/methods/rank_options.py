"""What methods share whose result has a rank of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from merging.errors import RecipeError, shown
from merging.methods.registry import Options

_LARGEST = 2**31 - 1  # far beyond any use, and still a number that every process can be sent


@dataclass(frozen=True)
class RankOptions(Options):
    """rank: rank of the result; the largest rank of the adapters if not given. Subclasses say whose options they are."""

    method: ClassVar[str]
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank {self.rank} of {self.method}; use 1 or more", "rank")
        if self.rank is not None and self.rank > _LARGEST:
            raise RecipeError(f"rank {shown(self.rank)} of {self.method}; use {_LARGEST} at most", "rank")


def merged_rank(ranks: Sequence[int], options: RankOptions) -> int:
    """The rank of a merged module: what was asked, or the largest rank of the adapters; never over all of them together."""
    return min(options.rank or max(ranks), sum(ranks))
