"""The worker extension over a stand-in for vLLM's LoRA manager: what it puts into slots, and what it never lets out of them."""

import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import MODULES, tiny_adapter

from merging import save_adapter
from server.merger import Job

vllm_worker = pytest.importorskip("server.vllm_worker", reason="needs vLLM")
SLOTS = 2  # usable ones; on the CPU a third stays empty


class Manager:
    """vLLM's LRUCacheLoRAModelManager as far as loramix uses it, with slots filled from the first on."""

    def __init__(self, slots: int) -> None:
        self.slots: list[int | None] = [None] * slots
        self.registered: OrderedDict[int, Any] = OrderedDict()
        self.seen: dict[int, set[str]] = {}
        self.modules = {
            name: SimpleNamespace(base_layer=SimpleNamespace(output_size=out, input_size=inp))
            for name, (out, inp) in MODULES.items()
        }
        self.packed_modules: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self.registered)

    def add_adapter(self, model: Any) -> None:
        self.registered[model.id] = model

    def activate_adapter(self, lora_id: int) -> None:
        self.slots[self.slots.index(None)] = lora_id
        self.seen[lora_id] = set(self.registered[lora_id].loras)

    def remove_adapter(self, lora_id: int) -> None:
        if self.registered.pop(lora_id, None) is not None:
            self.slots[self.slots.index(lora_id)] = None

    def remove_oldest_adapter(self) -> None:
        self.remove_adapter(next(iter(self.registered)))


@pytest.fixture
def worker() -> Any:
    config = SimpleNamespace(lora_dtype=torch.bfloat16, max_loras=SLOTS + 1, max_lora_rank=16)
    worker = vllm_worker.LoramixWorker()
    worker.device = torch.device("cpu")
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(lora_config=config, _adapter_manager=Manager(SLOTS + 1)))
    return worker


def manager_of(worker: Any) -> Manager:
    manager: Manager = worker.model_runner.lora_manager._adapter_manager
    return manager


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tiny_adapter(4, seed=0), tmp_path / "math")
    return tmp_path / "math"


def job(lora_id: int, folder: Path, digest: str | None = None) -> Job:
    return Job(
        lora_id=lora_id, method="cat", options={}, terms=[("math", 1.0, str(folder), digest or tiny_adapter(4, 0).digest)]
    )


def commit(worker: Any, lora_id: int, victim: int | None = None) -> dict[str, Any]:
    for _ in range(500):
        reply: dict[str, Any] = worker.loramix_commit(lora_id, victim)
        if reply["state"] != "pending":
            return reply
        time.sleep(0.01)
    raise AssertionError("never done")


def build(worker: Any, folder: Path, lora_id: int, victim: int | None = None) -> dict[str, Any]:
    worker.loramix_begin(job(lora_id, folder))
    return commit(worker, lora_id, victim)


def test_the_facts_are_those_of_the_model_and_one_slot_stays_empty_on_the_cpu(worker: Any) -> None:
    assert worker.loramix_setup(1 << 20) == {
        "modules": MODULES, "slots": SLOTS, "max_rank": 16, "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip


def test_a_merge_is_put_into_a_slot_and_its_tensors_are_let_go(worker: Any, folder: Path) -> None:
    worker.loramix_setup(1 << 20)
    reply = build(worker, folder, 5)
    assert (reply["state"], reply["nbytes"]) == ("done", 2 * 4 * sum(d_out + d_in for d_out, d_in in MODULES.values()))
    assert set(reply["seconds"]) == {"load", "merge", "commit"}
    assert manager_of(worker).slots == [5, None, None]
    assert manager_of(worker).seen[5] == set(MODULES)
    assert manager_of(worker).registered[5].loras == {}


def test_committing_again_changes_nothing(worker: Any, folder: Path) -> None:
    worker.loramix_setup(1 << 20)
    first = build(worker, folder, 5)
    assert worker.loramix_commit(5, None) == first
    assert manager_of(worker).slots == [5, None, None]


def test_a_victim_leaves_its_slot_at_the_commit_and_not_before(worker: Any, folder: Path) -> None:
    worker.loramix_setup(1 << 20)
    build(worker, folder, 1)
    build(worker, folder, 2)
    worker.loramix_begin(job(3, folder))
    assert manager_of(worker).slots == [1, 2, None]
    commit(worker, 3, victim=1)
    assert manager_of(worker).slots == [3, 2, None]


def test_a_failed_merge_is_reported_and_leaves_the_slots_alone(worker: Any, folder: Path) -> None:
    worker.loramix_setup(1 << 20)
    build(worker, folder, 1)
    worker.loramix_begin(job(2, folder, digest="another"))
    reply = commit(worker, 2, victim=1)
    assert (reply["state"], reply["kind"]) == ("failed", "AdapterError")
    assert "has changed since it was checked" in reply["message"]
    assert manager_of(worker).slots == [1, None, None]


def test_what_the_engine_asks_for_after_its_eviction_is_merged_again_within_the_usable_slots(worker: Any, folder: Path) -> None:
    worker.loramix_setup(1 << 20)
    for lora_id in (1, 2):
        build(worker, folder, lora_id)
    build(worker, folder, 3, victim=1)
    manager = manager_of(worker)
    guest = worker.loramix_load(SimpleNamespace(lora_int_id=1, lora_name="gone"))  # as vLLM's manager calls it, then:
    manager.add_adapter(guest)
    manager.activate_adapter(1)
    assert set(guest.loras) == set(MODULES)
    assert manager.slots[-1] is None
    build(worker, folder, 4, victim=3)
    assert 1 not in manager.slots  # nobody leases it: it leaves with the next commit
    assert manager.slots[-1] is None


def test_what_was_never_merged_cannot_be_loaded(worker: Any) -> None:
    worker.loramix_setup(1 << 20)
    with pytest.raises(ValueError, match="never merged by loramix"):
        worker.loramix_load(SimpleNamespace(lora_int_id=9, lora_name="stranger"))
