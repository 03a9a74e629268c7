"""vLLM's LoRA slots: which adapter has which, and where in it each module's factors go.

vLLM's LoRA layers hold the factors of all slots stacked: per slice `lora_a_stacked[slice]` (slots, 1, rank, inputs) and
`lora_b_stacked[slice]` (slots, 1, outputs, rank). Merges write straight into them, so that all that is left to do in the
engine's thread is to note who has the slot.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel

from merging import Room, Rooms
from server.errors import ConfigError


@dataclass(frozen=True)
class _Part:
    """A module as adapters know it: slice `place` of vLLM's `layer`, (d_out, d_in) on all GPUs together."""

    name: str
    layer: Any
    place: int
    shape: tuple[int, int]


class Slots:
    """The slots that adapters may take, filled from the first on; for the engine's thread alone.

    On the CPU the last one stays empty: vLLM's kernels there look up a token without an adapter at index −1, which is the
    last slot, so that a request for the base model would be answered with the adapter in it.

    Args:
        manager: vLLM's LoRAModelManager.

    Attributes:
        shapes: (d_out, d_in) of every module that can be adapted, as one GPU alone would hold it.
        nbytes: of one slot here.
        whole: whether slots here hold whole factors, as on one GPU alone.

    Raises:
        ConfigError: where a layer holds parts of a factor that do not lie together.
    """

    def __init__(self, manager: Any, device: torch.device) -> None:
        self._manager = manager
        parts = list(_parts(manager))
        windows = {part.name: _window(part) for part in parts}
        count: int = manager.lora_config.max_loras
        self._rooms = [
            Rooms({part.name: _room(part, slot, *windows[part.name]) for part in parts})
            for slot in range(count - 1 if device.type == "cpu" else count)
        ]
        self.shapes = {part.name: part.shape for part in parts}
        held = {name: (len(room.b_OK), room.a_KI.shape[1]) for rooms in self._rooms[:1] for name, room in rooms.items()}
        self.whole = held == self.shapes
        self.nbytes = sum(room.a_KI.nbytes + room.b_OK.nbytes for rooms in self._rooms[:1] for room in rooms.values())

    def __len__(self) -> int:
        return len(self._rooms)

    @property
    def taken(self) -> list[int]:
        """The ids that have a slot, the one that the engine has not used for longest first."""
        return list(self._manager.list_adapters())

    def take(self, lora_id: int) -> Rooms:
        """Give a free slot to an id, for vLLM an active adapter from now on; what is in the slot stays to be written."""
        slot: int = self._manager.lora_index_to_id.index(None)
        self._manager._registered_adapters[lora_id] = LoRAModel(lora_id, 1, {})
        self._manager._active_adapters[lora_id] = None
        self._manager.lora_index_to_id[slot] = lora_id
        return self._rooms[slot]

    def free(self, lora_id: int) -> None:
        """Take the slot from an id, if it has one."""
        self._manager.remove_adapter(lora_id)


def _parts(manager: Any) -> Iterator[_Part]:
    """Packed layers (qkv_proj, gate_up_proj) come as the parts that adapters know, one a slice."""
    for name, layer in manager.modules.items():
        base: Any = getattr(layer, "base_layer", None)
        if not hasattr(base, "input_size") or not hasattr(base, "output_size"):
            continue  # embeddings, expert layers
        names = manager.packed_modules.get(name, [name])
        if len(names) == 1:
            sizes = [base.output_size]
        elif hasattr(base, "total_num_kv_heads"):
            key_size = base.total_num_kv_heads * base.head_size
            sizes = [base.total_num_heads * base.head_size, key_size, key_size]
        else:
            sizes = list(base.output_sizes)
        if len(names) == len(sizes) == len(layer.lora_a_stacked):  # else one factor would go into several slices
            for place, (part, size) in enumerate(zip(names, sizes, strict=True)):
                yield _Part(part, layer, place, (size, base.input_size))


def _window(part: _Part) -> tuple[int, int]:
    """The first input and the first output that this GPU holds: what is left of their numbers when vLLM has sliced them."""
    outputs, inputs = part.shape
    a_1I, b_O1 = torch.arange(inputs)[None], torch.arange(outputs)[:, None]
    slices = len(part.layer.lora_a_stacked)
    if slices == 1:
        a_1I, b_O1 = part.layer.slice_lora_a(a_1I), part.layer.slice_lora_b(b_O1)
    else:
        others = [None] * slices
        a_1I = part.layer.slice_lora_a([*others[: part.place], a_1I, *others[part.place + 1 :]])[part.place]
        b_O1 = part.layer.slice_lora_b([*others[: part.place], b_O1, *others[part.place + 1 :]])[part.place]
    _, _, _, width = part.layer.lora_a_stacked[part.place].shape
    _, _, height, _ = part.layer.lora_b_stacked[part.place].shape
    return _first(a_1I[0], width, part.name), _first(b_O1[:, 0], height, part.name)


def _first(numbers: Tensor, count: int, name: str) -> int:
    first = int(numbers[0])
    if not torch.equal(numbers, torch.arange(first, first + count)):
        raise ConfigError(f"vLLM splits {name} over the GPUs in a way that loramix does not know; serve it on one GPU")
    return first


def _room(part: _Part, slot: int, first_input: int, first_output: int) -> Room:
    a_KI = part.layer.lora_a_stacked[part.place][slot, 0]
    b_OK = part.layer.lora_b_stacked[part.place][slot, 0]
    return Room(a_KI, b_OK, first_input, first_output)
