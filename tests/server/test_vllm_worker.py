"""The worker extension over vLLM's own bookkeeping of adapters: what it puts into slots, and what it never lets out of them."""

import time
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disk_harness import until
from harness import MODULES, Gate, tiny_adapter

from merging import LoraAdapter, load_adapter, save_adapter
from server import merger as merger_module
from server.job import Job

model_manager = pytest.importorskip("vllm.lora.model_manager", reason="needs vLLM")
vllm_worker = pytest.importorskip("server.vllm_worker", reason="needs vLLM")
SLOTS = 2  # usable ones; on the CPU a third stays empty
RANK = 16


class Layer:
    """A LoRA layer on one GPU alone, written by vLLM slot by slot."""

    def __init__(self, d_out: int, d_in: int) -> None:
        self.base_layer = SimpleNamespace(input_size=d_in, output_size=d_out)
        self.lora_a_stacked = (torch.zeros(SLOTS + 1, 1, RANK, d_in).bfloat16(),)
        self.lora_b_stacked = (torch.zeros(SLOTS + 1, 1, d_out, RANK).bfloat16(),)
        self.slice_lora_a = self.slice_lora_b = lambda factor: factor

    def reset_lora(self, slot: int) -> None:
        self.lora_a_stacked[0][slot] = self.lora_b_stacked[0][slot] = 0

    def set_lora(self, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        self.reset_lora(slot)
        self.lora_a_stacked[0][slot, 0, : len(a)], self.lora_b_stacked[0][slot, 0, :, : len(a)] = a, b


class Manager(model_manager.LRUCacheLoRAModelManager):  # type: ignore[misc,name-defined]
    """vLLM's, but for what it needs a model for."""

    def __init__(self) -> None:
        self.lora_config = SimpleNamespace(
            lora_dtype=torch.bfloat16,
            max_loras=SLOTS + 1,
            max_cpu_loras=SLOTS + 1,
            max_lora_rank=RANK,
            fully_sharded_loras=False,
        )
        self._registered_adapters = model_manager.AdapterLRUCache(self.capacity, self.deactivate_adapter)
        self._active_adapters = model_manager.AdapterLRUCache(self.lora_slots, self._deactivate_adapter)
        self.lora_index_to_id: list[int | None] = [None] * self.lora_slots
        self.modules = {name: Layer(*shape) for name, shape in MODULES.items()}
        self.packed_modules: dict[str, list[str]] = {}
        self.is_pooling_model = False

    def _add_adapter(self, lora: Any) -> None:
        self._registered_adapters[lora.id] = lora

    def content(self, lora_id: int) -> dict[str, torch.Tensor]:
        """The ΔW that a slot holds, by module."""
        slot = self.lora_index_to_id.index(lora_id)
        return {
            name: layer.lora_b_stacked[0][slot, 0].float() @ layer.lora_a_stacked[0][slot, 0].float()
            for name, layer in self.modules.items()
        }


class Bench:
    """A worker, driven as vLLM and the server drive it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache_dir: str | None = None) -> None:
        self.reports: SimpleQueue[Any] = SimpleQueue()
        monkeypatch.setattr(vllm_worker, "Reporter", lambda address: SimpleNamespace(send=self.take))
        self.figures: list[Any] = []
        self.manager = Manager()
        self.worker = vllm_worker.LoramixWorker()
        self.worker.device, self.worker.rank = torch.device("cpu"), 0
        lora_manager = SimpleNamespace(lora_config=self.manager.lora_config, _adapter_manager=self.manager)
        self.worker.model_runner = SimpleNamespace(lora_manager=lora_manager)
        self.facts = self.worker.loramix_setup("ipc:///nowhere", 1 << 20, 1 << 20, cache_dir, 1 << 20)

    def take(self, message: Any) -> None:
        if "families" in message:
            self.figures.append(message)
        else:
            self.reports.put(message)

    def figure(self, name: str, **labels: str) -> float:
        samples = [sample for *_, family in self.figures[-1]["families"] for sample in family]
        return sum(value for sample, its, value in samples if (sample, its) == (name, labels))

    def build(self, job: Job, victim: int | None = None) -> Any:
        self.worker.loramix_begin(job, victim)
        return self.reports.get(timeout=10)

    def step(self, *lora_ids: int) -> None:
        """What vLLM's `_apply_adapters` does before a step with requests for these adapters."""
        for lora_id in lora_ids:
            if lora_id not in self.manager.list_adapters():
                lora = self.worker.model_runner.lora_manager._load_adapter(SimpleNamespace(lora_int_id=lora_id, lora_name="it"))
                self.manager.remove_adapter(lora.id)
                if len(self.manager) + 1 > self.manager.capacity:
                    self.manager.remove_oldest_adapter()
            else:
                lora = self.manager.get_adapter(lora_id)
            self.manager.add_adapter(lora)
            self.manager.activate_adapter(lora_id)

    def serves(self, lora_id: int, adapter: LoraAdapter) -> bool:
        content = self.manager.content(lora_id)
        return all(
            torch.allclose(content[name], module.delta().float(), atol=0.15, rtol=0.02)
            for name, module in adapter.modules.items()
        )


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.fixture
def folders(tmp_path: Path) -> dict[int, Path]:
    """A folder of other content for every LoRA id."""
    for lora_id in range(1, 6):
        save_adapter(tiny_adapter(4, seed=lora_id), tmp_path / f"adapter-{lora_id}")
    return {lora_id: tmp_path / f"adapter-{lora_id}" for lora_id in range(1, 6)}


@pytest.fixture
def jobs(folders: dict[int, Path]) -> dict[int, Job]:
    return {
        lora_id: Job(
            lora_id=lora_id, key=f"{lora_id:064x}", nbytes=1, method="cat", request_id=None, options={},
            terms=[("it", 1.0, str(folder), load_adapter(folder).digest, 1)],
        )
        for lora_id, folder in folders.items()
    }  # fmt: skip


def test_the_facts_are_those_of_the_model_and_one_slot_stays_empty_on_the_cpu(bench: Bench) -> None:
    host = bench.facts.pop("host")
    assert host
    assert bench.facts == {
        "modules": MODULES, "slots": SLOTS, "max_rank": RANK, "dtype": "bfloat16", "device": "cpu",
        "slot_bytes": 2 * RANK * sum(d_out + d_in for d_out, d_in in MODULES.values()),
    }  # fmt: skip


def test_sharded_factors_are_refused(bench: Bench) -> None:
    bench.manager.lora_config.fully_sharded_loras = True
    assert "--fully-sharded-loras" in bench.worker.loramix_setup("ipc:///nowhere", 1, 1, None, 1)["error"]


def test_a_merge_has_its_slot_at_once_and_its_content_when_it_is_reported(
    bench: Bench, jobs: dict[int, Job], gate: Gate
) -> None:
    gate.close()
    bench.worker.loramix_begin(jobs[1], None)
    assert gate.begun.wait(10)
    assert bench.manager.lora_index_to_id == [1, None, None]
    assert bench.reports.empty()
    gate.go_on.set()
    report = bench.reports.get(timeout=10)
    assert (report["lora_id"], report["state"]) == (1, "done")
    assert 0 < report["seconds"]["commit"] < 1
    bench.step(1)  # vLLM finds it there, and loads nothing
    assert bench.serves(1, tiny_adapter(4, 1))
    assert not bench.serves(1, tiny_adapter(4, 2))


def test_a_victim_leaves_its_slot_as_the_merge_begins(bench: Bench, jobs: dict[int, Job]) -> None:
    bench.build(jobs[1])
    bench.build(jobs[2])
    bench.build(jobs[3], victim=1)
    assert bench.manager.lora_index_to_id == [3, 2, None]
    assert set(bench.manager.list_adapters()) == {2, 3}
    assert bench.serves(3, tiny_adapter(4, 3))
    assert bench.serves(2, tiny_adapter(4, 2))


def test_a_failed_merge_is_reported_and_its_slot_is_free_once_the_server_says_so(
    bench: Bench, jobs: dict[int, Job], folders: dict[int, Path]
) -> None:
    bench.build(jobs[1])
    (folders[2] / "adapter_model.safetensors").unlink()
    report = bench.build(jobs[2])
    assert (report["state"], report["fault"]["kind"]) == ("failed", "AdapterError")
    bench.worker.loramix_evict(2)
    assert bench.manager.lora_index_to_id == [1, None, None]
    bench.build(jobs[3])
    assert bench.manager.lora_index_to_id == [1, 3, None]


def test_the_slot_of_a_dropped_merge_is_nobodys_before_its_thread_has_let_go(
    bench: Bench, jobs: dict[int, Job], gate: Gate
) -> None:
    gate.close()
    bench.worker.loramix_begin(jobs[1], None)
    assert gate.begun.wait(10)
    bench.worker.loramix_drop(1)
    assert bench.manager.lora_index_to_id == [1, None, None]
    bench.worker.loramix_begin(jobs[2], None)
    assert bench.manager.lora_index_to_id == [1, 2, None]
    gate.go_on.set()
    for _ in range(2):
        bench.reports.get(timeout=10)
    bench.worker.loramix_evict(1)
    assert bench.manager.lora_index_to_id == [None, 2, None]


def test_what_the_engine_asks_for_after_its_eviction_is_merged_again_within_the_usable_slots(
    bench: Bench, jobs: dict[int, Job]
) -> None:
    for lora_id in (1, 2):
        bench.build(jobs[lora_id])
    bench.build(jobs[3], victim=1)
    bench.step(3, 1)  # 2 has been unused for longest: it makes room
    assert bench.serves(1, tiny_adapter(4, 1))
    assert set(bench.manager.list_adapters()) == {1, 3}
    assert bench.manager.lora_index_to_id[-1] is None
    bench.step(2)  # a resident one, for the server; 3 makes room
    assert bench.serves(2, tiny_adapter(4, 2))
    bench.build(jobs[4], victim=3)
    assert set(bench.manager.list_adapters()) == {2, 4}  # nobody leases 1: it left as the merge began
    assert bench.serves(4, tiny_adapter(4, 4))
    assert bench.manager.lora_index_to_id[-1] is None


def test_a_slot_that_is_being_written_makes_room_only_when_it_no_longer_is(
    bench: Bench, jobs: dict[int, Job], gate: Gate
) -> None:
    for lora_id in (1, 2):
        bench.build(jobs[lora_id])
    gate.close()
    bench.worker.loramix_begin(jobs[3], 1)
    assert gate.begun.wait(10)
    bench.step(2)  # used since: 3 is the one to make room
    started = time.perf_counter()
    bench.worker.loramix_merger._threads.submit(lambda: (time.sleep(0.1), gate.go_on.set()))
    bench.step(1)
    assert time.perf_counter() - started >= 0.1
    assert bench.serves(1, tiny_adapter(4, 1))
    assert bench.serves(2, tiny_adapter(4, 2))
    bench.step(3)
    assert bench.serves(3, tiny_adapter(4, 3))


def test_an_adapter_that_cannot_be_merged_again_does_not_end_the_engine(
    bench: Bench, jobs: dict[int, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench.build(jobs[1])
    bench.build(jobs[2], victim=1)
    monkeypatch.setattr(merger_module, "merge", fail)
    bench.step(1)
    assert all((delta == 0).all() for delta in bench.manager.content(1).values())
    assert bench.serves(2, tiny_adapter(4, 2))


def test_with_a_disk_cache_a_restarted_worker_serves_what_another_has_written(
    monkeypatch: pytest.MonkeyPatch, jobs: dict[int, Job], tmp_path: Path
) -> None:
    bench = Bench(monkeypatch, str(tmp_path / "cache"))
    assert bench.build(jobs[1])["disk"] == "miss"
    until(lambda: bench.figure("loramix_disk_writes_total", outcome="written") == 1)
    restarted = Bench(monkeypatch, str(tmp_path / "cache"))
    assert restarted.build(jobs[1])["disk"] == "hit"
    assert restarted.serves(1, tiny_adapter(4, 1))


@pytest.mark.parametrize("how", ["evicted", "given away inside a step"])
def test_a_slot_that_is_no_longer_an_adapters_own_is_not_written_to_disk(
    monkeypatch: pytest.MonkeyPatch, jobs: dict[int, Job], tmp_path: Path, copying: tuple[Event, Event], how: str
) -> None:
    bench = Bench(monkeypatch, str(tmp_path / "cache"))
    begun, go_on = copying
    bench.build(jobs[1])
    assert begun.wait(10)
    if how == "evicted":
        bench.build(jobs[2], victim=1)
    else:
        bench.build(jobs[2])
        bench.build(jobs[3], victim=2)
        bench.step(2)  # 1 has been unused for longest: it makes room
    go_on.set()
    disk = bench.worker.loramix_merger._disk
    disk._keeper._thread.shutdown()
    disk._cache.close()  # all that there was to write is written
    assert bench.figure("loramix_disk_writes_total", outcome="left") > 0
    assert not list((tmp_path / "cache").glob(f"{jobs[1]['key']}*"))


def test_what_was_never_merged_cannot_be_loaded(bench: Bench) -> None:
    with pytest.raises(ValueError, match="never merged by loramix"):
        bench.step(9)


def test_a_forgotten_source_frees_its_memory_and_what_was_merged_of_it_stays(bench: Bench, jobs: dict[int, Job]) -> None:
    for lora_id in (1, 2):
        bench.build(jobs[lora_id])
    both = bench.worker.loramix_forget([])
    digest = jobs[1]["terms"][0][3]
    assert bench.worker.loramix_forget([digest]) == {"host": both["host"] // 2}
    assert bench.serves(1, tiny_adapter(4, 1))
    bench.worker.loramix_evict(1)
    assert bench.manager.lora_index_to_id == [None, 2, None]
    assert bench.build(jobs[1])["tiers"] == {"disk": 1}


def test_warming_up_leaves_no_trace(bench: Bench, jobs: dict[int, Job]) -> None:
    bench.worker.loramix_warm_up("cat", 4)
    bench.build(jobs[1])
    assert bench.manager.lora_index_to_id == [1, None, None]
