"""What the server needs of an engine, free of vLLM: facts about the model, and merging into its slots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

from server.catalog import Recipe


@dataclass(frozen=True)
class EngineFacts:
    """What the engine says of itself once the model is loaded.

    Attributes:
        modules: (d_out, d_in) of every module that can be adapted, by its name in an adapter.
        slots: merged adapters that fit on the device at once.
        max_rank: largest rank that fits a slot.
        dtype: the engine's LoRA dtype by torch's name.
        device: where it merges.
    """

    modules: Mapping[str, tuple[int, int]]
    slots: int
    max_rank: int
    dtype: str
    device: str


class MergeReport(TypedDict):
    """What a build cost: seconds by phase (`load`, `merge`, `commit`), bytes and rank of the result."""

    seconds: dict[str, float]
    nbytes: int
    rank: int


class Engine(Protocol):
    """Builds merged adapters and holds them in its slots."""

    async def build(self, recipe: Recipe, victim: Recipe | None) -> MergeReport:
        """Merge `recipe` and put it into the slot of `victim`, or into a free one; callable by name from then on.

        Raises LoramixError, and then the slot of `victim` is as it was.
        """
        ...

    async def evict(self, recipe: Recipe) -> None:
        """Free the slot of a built recipe."""
        ...
