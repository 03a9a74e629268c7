"""What the engine's model can adapt, and whether an adapter fits it."""

from collections.abc import Mapping
from dataclasses import dataclass

from merging import AdapterError
from server.survey import Survey

_WIDEST = 4  # bytes of an entry, in float32
_AROUND = 2**24  # bytes, for what a weights file holds beside the factors; of a configuration at most


@dataclass(frozen=True)
class Adaptable:
    """The model: (d_out, d_in) by the name of each module that can be adapted, and the largest rank that a slot holds."""

    modules: Mapping[str, tuple[int, int]]
    max_rank: int

    @property
    def most_bytes(self) -> int:
        """Of the weights file of any adapter that fits."""
        return self.max_rank * sum(map(sum, self.modules.values())) * _WIDEST + _AROUND

    def check(self, adapter: Survey) -> None:
        """Whether it can serve this adapter. Raises AdapterError with the reason and the remedy."""
        trained_on = adapter.base_model or "another base model"
        unknown = [name for name in adapter.shapes if name not in self.modules]
        if len(unknown) == len(adapter.shapes):
            raise AdapterError(
                f"none of its {len(unknown)} modules ({unknown[0]}, …) is one that this model can adapt, "
                f"so it would have no effect; it was trained on {trained_on} (--lora-target-modules says what can be adapted)"
            )
        if unknown:
            raise AdapterError(
                f"{unknown[0]} and {len(unknown) - 1} more of its modules are none that this model can adapt; train without "
                "them, or start the server with --lora-target-modules that name them"
            )
        for name, shape in adapter.shapes.items():
            if shape != tuple(self.modules[name]):
                raise AdapterError(
                    f"{name} is {shape}, but {tuple(self.modules[name])} in this model: it was trained on {trained_on}; "
                    "serve that one"
                )
        if adapter.rank > self.max_rank:
            raise AdapterError(
                f"rank {adapter.rank} is over this server's {self.max_rank}; "
                f"start it with --max-lora-rank {adapter.rank} or more"
            )
