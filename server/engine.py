"""What the server needs of an engine, free of vLLM: facts about the model, and merging into its slots."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

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


@dataclass(frozen=True)
class Resident:
    """A merged adapter in a slot of the engine.

    Attributes:
        lora_id: the engine's id for it; another one each time that a recipe is built.
        seconds: what the build took, by phase (see Metrics.merge_seconds).
        nbytes: of its slot.
        sources: how many source adapters were found where: `device`, `host` or `disk`.
        disk: whether the disk cache had it, `hit` or `miss`; None where it was not asked.
        source_bytes: what all source adapters in memory take up now, by tier.
    """

    recipe: Recipe
    lora_id: int
    seconds: Mapping[str, float]
    nbytes: int
    sources: Mapping[str, int]
    disk: Literal["hit", "miss"] | None
    source_bytes: Mapping[str, int]


class Engine(Protocol):
    """Builds merged adapters and holds them in its slots."""

    async def build(self, recipe: Recipe, victim: Resident | None) -> Resident:
        """Merge `recipe` into the slot of `victim`, or into a free one; callable by name from then on.

        Where it raises LoramixError, or is cancelled, it leaves that slot free, and ends only once nobody writes it any more.
        """
        ...

    async def evict(self, resident: Resident) -> None:
        """Empty the slot of what no request uses; nobody can call it by its name from now on."""
        ...

    async def forget(self, digests: Collection[str]) -> Mapping[str, int]:
        """Free the memory of adapters by what the store knows them by: digests of sources, keys of merged ones from disk.

        Returns:
            what the others take up, by tier.
        """
        ...
