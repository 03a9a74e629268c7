"""Slots of vLLM's LoRA layers: what is merged straight into them is what vLLM's own `set_lora` would have put there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import tiny_adapter

from merging import LoraAdapter, MergeSpec, Term, merge, merge_into
from server.errors import ConfigError

layers = pytest.importorskip("vllm.lora.layers", reason="needs vLLM")
vllm_slots = pytest.importorskip("server.vllm_slots", reason="needs vLLM")

SLOTS, RANK = 3, 8
HEADS, KEY_HEADS, HEAD = 4, 2, 6
WIDTH, INNER = HEADS * HEAD, 20
SHAPES = {
    "q_proj": (WIDTH, WIDTH), "k_proj": (KEY_HEADS * HEAD, WIDTH), "v_proj": (KEY_HEADS * HEAD, WIDTH),
    "o_proj": (WIDTH, WIDTH), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER),
    "router": (12, WIDTH), "wide": (16, WIDTH),
}  # fmt: skip
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def layer(kind: str, gpus: int, rank: int, *, inputs: int, outputs: list[int], **extra: Any) -> Any:
    """One of vLLM's LoRA layers of one of `gpus`, with the attributes that vLLM's constructors give it, and its stacks."""
    made = getattr(layers, kind).__new__(getattr(layers, kind))
    torch.nn.Module.__init__(made)
    row = kind.startswith("RowParallel")
    local = [size if row or kind.startswith("Replicated") else size // gpus for size in outputs]
    made.base_layer = SimpleNamespace(input_size=inputs, output_size=sum(outputs), output_sizes=outputs, **extra)
    made.tp_size, made.tp_rank = gpus, rank
    made.input_size = inputs // gpus if row else inputs
    made.output_size = sum(local)
    made.is_merged_col_linear = False
    made.n_slices, made.output_slices, made.output_ids = len(outputs), tuple(local), (rank,) * len(outputs)
    if extra:
        made.q_shard_id, made.kv_shard_id = rank, rank // extra["num_kv_head_replicas"]
        made.output_slices = (made.output_slices[0], *[HEAD * extra["num_kv_heads"]] * 2)
        made.output_ids = (made.q_shard_id, made.kv_shard_id, made.kv_shard_id)
    made.lora_a_stacked = tuple(torch.full((SLOTS, 1, RANK, made.input_size), 7.0) for _ in outputs)
    made.lora_b_stacked = tuple(torch.full((SLOTS, 1, size, RANK), 7.0) for size in made.output_slices)
    return made


def model(gpus: int = 1, rank: int = 0) -> SimpleNamespace:
    """A manager of one layer of each kind, as one of `gpus` holds it."""
    replicas = max(1, gpus // KEY_HEADS)
    heads = {
        "total_num_heads": HEADS, "total_num_kv_heads": KEY_HEADS, "head_size": HEAD, "num_kv_head_replicas": replicas,
        "num_kv_heads": max(1, KEY_HEADS // gpus),
    }  # fmt: skip
    key = KEY_HEADS * HEAD
    modules = {
        "qkv_proj": layer("MergedQKVParallelLinearWithLoRA", gpus, rank, inputs=WIDTH, outputs=[WIDTH, key, key], **heads),
        "o_proj": layer("RowParallelLinearWithLoRA", gpus, rank, inputs=WIDTH, outputs=[WIDTH]),
        "gate_up_proj": layer("MergedColumnParallelLinearWithLoRA", gpus, rank, inputs=WIDTH, outputs=[INNER, INNER]),
        "down_proj": layer("RowParallelLinearWithLoRA", gpus, rank, inputs=INNER, outputs=[WIDTH]),
        "router": layer("ReplicatedLinearWithLoRA", gpus, rank, inputs=WIDTH, outputs=[12]),
        "wide": layer("ColumnParallelLinearWithLoRA", gpus, rank, inputs=WIDTH, outputs=[16]),
        "lm_head": SimpleNamespace(base_layer=SimpleNamespace(num_embeddings=3)),
    }
    return SimpleNamespace(modules=modules, packed_modules=PACKED, lora_config=SimpleNamespace(max_loras=SLOTS))


def slots_of(manager: Any, device: str = "cuda") -> Any:
    return vllm_slots.Slots(manager, torch.device(device))


def set_by_vllm(manager: Any, slot: int, merged: LoraAdapter) -> None:
    """As vLLM's `activate_adapter` does, which takes packed layers' factors as lists."""
    for name, each in manager.modules.items():
        if name != "lm_head":
            parts = [merged.modules.get(part) for part in PACKED.get(name, [name])]
            a, b = [part and part.a.float() for part in parts], [part and part.b.float() for part in parts]
            if len(parts) > 1:
                each.set_lora(slot, a, b)
            elif parts[0] is None:
                each.reset_lora(slot)
            else:
                each.set_lora(slot, a[0], b[0])


@pytest.mark.parametrize(("gpus", "rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 3)])
@pytest.mark.parametrize("left_out", [(), ("k_proj", "up_proj", "o_proj")])
def test_a_merge_fills_a_slot_as_vllm_does_on_every_gpu(gpus: int, rank: int, left_out: tuple[str, ...]) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name not in left_out}
    adapters = {"one": tiny_adapter(3, 1, shapes), "other": tiny_adapter(2, 2, shapes)}
    spec = MergeSpec.create("cat", [Term("one"), Term("other", -0.5)])
    ours, theirs = model(gpus, rank), model(gpus, rank)
    merge_into(adapters, spec, slots_of(ours)._rooms[1])
    set_by_vllm(theirs, 1, merge(adapters, spec, dtype=torch.float32))
    for name in SHAPES.keys() - {part for parts in PACKED.values() for part in parts} | PACKED.keys():
        for ours_all, theirs_all in zip(_stacks(ours.modules[name]), _stacks(theirs.modules[name]), strict=True):
            assert torch.equal(ours_all[1], theirs_all[1]), name
            assert (ours_all[[0, 2]] == 7).all(), "another slot was written"


def _stacks(each: Any) -> list[torch.Tensor]:
    return [*each.lora_a_stacked, *each.lora_b_stacked]


@pytest.mark.parametrize("gpus", [1, 2])
def test_shapes_are_those_of_the_whole_model_and_what_cannot_be_written_has_none(gpus: int) -> None:
    manager = model(gpus, gpus - 1)
    manager.modules["several"] = layer("ColumnParallelLinearWithLoRA", 1, 0, inputs=WIDTH, outputs=[8, 8, 8])  # from one factor
    assert slots_of(manager).shapes == SHAPES
    assert slots_of(manager).whole == (gpus == 1)
    assert slots_of(manager).nbytes == sum(
        t[0].nbytes for name in model().modules if name != "lm_head" for t in _stacks(manager.modules[name])
    )


def test_on_the_cpu_the_last_slot_stays_empty() -> None:
    assert len(slots_of(model(), "cpu")) == SLOTS - 1
    assert len(slots_of(model(), "cuda")) == SLOTS


def test_a_layer_whose_part_here_is_no_window_is_refused() -> None:
    manager = model(2, 0)
    manager.modules["wide"].is_merged_col_linear = True  # two halves, from each of which a GPU holds a half
    with pytest.raises(ConfigError, match="splits wide over the GPUs"):
        slots_of(manager)
