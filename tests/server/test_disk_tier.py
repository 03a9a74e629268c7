"""The disk tier under the merger: what is read is what was merged, to the bit, and what is written is what it says."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from disk_harness import PLENTY, WEIGHTS, Cache, until
from harness import MODULES
from merger_harness import CPU, RANK, Bench, Worker, holds, job_of, offline

from merging import LoraAdapter, Room, Rooms, Term, load_adapter, merge_into
from server import merger as merger_module
from server.disk_tier import DiskTier
from server.errors import BusyError

Folders = dict[str, Path]
METHODS = ["cat", "lego", "svd", "ties", "tsv"]


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Workers of servers that were started one after another on one folder."""
    made = []

    def make(**options: Any) -> Worker:
        made.append(Worker(tmp_path / "cache", **options))
        return made[-1]

    yield make
    for each in made:
        each.disk.cache.close()


@pytest.fixture
def worker(make_worker: Callable[..., Worker]) -> Worker:
    return make_worker()


MakeWorker = Callable[..., Worker]


@pytest.mark.parametrize("whole", [True, False], ids=["copied from its slot", "merged again"])
@pytest.mark.parametrize("method", METHODS)
def test_after_a_restart_an_adapter_is_read_to_the_bit_and_its_sources_are_not_needed(
    make_worker: MakeWorker, folders: Folders, method: str, whole: bool
) -> None:
    job = job_of(folders, 1, method, math=0.7, code=-0.3)
    first = make_worker(whole=whole)
    merged = first.built(job)
    assert first.last["disk"] == "miss"
    shutil.rmtree(folders["math"])
    second = make_worker()
    read = second.build(job)
    assert second.last["disk"] == "hit"
    assert second.last["tiers"] == {}
    assert {"commit", "queue", "disk"} == second.last["seconds"].keys()
    for name in MODULES:
        assert torch.equal(read[name].a_KI, merged[name].a_KI)
        assert torch.equal(read[name].b_OK, merged[name].b_OK)
    assert second.disk.count("writes_total", outcome="written") == 0


def test_an_entry_is_a_peft_folder_of_what_the_same_merge_gives_offline(worker: Worker, folders: Folders) -> None:
    job = job_of(folders, 1, "cat", part=1.0, math=0.5)
    worker.built(job)
    entry, merged = load_adapter(worker.entries()[job["key"]]), offline(folders, "cat", Term("part"), Term("math", 0.5))
    assert entry.digest == merged.digest  # with the ranks of its modules, which differ


def test_what_is_read_fills_the_windows_of_sharded_slots(make_worker: MakeWorker, folders: Folders) -> None:
    job = job_of(folders, 1, "lego", math=1.0, code=0.5)
    merged = make_worker(whole=False).built(job)
    windows = Rooms(
        {
            name: Room(torch.ones(RANK, d_in // 2).bfloat16(), torch.ones(d_out // 2, RANK).bfloat16(), d_in // 2, d_out // 2)
            for name, (d_out, d_in) in MODULES.items()
        }
    )
    worker = make_worker(whole=False)
    worker.begin(job, windows)
    assert worker.next()["disk"] == "hit"
    for name, (d_out, d_in) in MODULES.items():
        assert torch.equal(windows[name].a_KI, merged[name].a_KI[:, d_in // 2 :])
        assert torch.equal(windows[name].b_OK, merged[name].b_OK[d_out // 2 :])


def test_once_read_it_stays_in_memory_as_sources_do(make_worker: MakeWorker, folders: Folders) -> None:
    job = job_of(folders, 1, math=1.0, code=0.5)
    make_worker().built(job)
    worker = make_worker()
    first = worker.build(job)
    shutil.rmtree(worker.disk.path)
    assert holds(worker.build(job), offline(folders, "cat", Term("math"), Term("code", 0.5)))
    assert worker.last["disk"] == "hit"
    assert torch.equal(first["model.layers.0.q_proj"].a_KI, worker.build(job)["model.layers.0.q_proj"].a_KI)
    assert worker.disk.count("reads_total", result="hit") == 1
    assert len(worker.tier._estimates._reads) == 1  # what was in memory says nothing of the disk


def test_a_damaged_entry_is_merged_and_written_again(make_worker: MakeWorker, folders: Folders) -> None:
    job = job_of(folders, 1, math=1.0)
    entry = make_worker()
    entry.built(job)
    weights = entry.entries()[job["key"]] / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    worker = make_worker()
    assert holds(worker.built(job), offline(folders, "cat", Term("math")))
    assert worker.last["disk"] == "miss"
    assert worker.disk.count("reads_total", result="corrupt") == 1
    again = make_worker()
    assert holds(again.build(job), offline(folders, "cat", Term("math")))
    assert again.last["disk"] == "hit"


def test_the_entry_of_another_recipe_is_never_served(make_worker: MakeWorker, folders: Folders) -> None:
    math, code = job_of(folders, 1, math=1.0), job_of(folders, 2, code=1.0)
    first = make_worker()
    first.built(math)
    entry = first.entries()[math["key"]]
    entry.rename(entry.parent / entry.name.replace(math["key"], code["key"]))
    worker = make_worker()
    assert holds(worker.build(code), offline(folders, "cat", Term("code")))
    assert worker.last["disk"] == "miss"


def test_entries_made_elsewhere_are_not_taken_for_ones_own(
    make_worker: MakeWorker, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(folders, 1, math=1.0)
    make_worker().built(job)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        worker = make_worker()
    worker.build(job)
    assert worker.last["disk"] == "miss"
    until(lambda: len(list(worker.disk.path.glob(f"{job['key']}.*"))) == 2)


def test_a_build_that_is_dropped_while_it_reads_the_disk_ends_there(
    make_worker: MakeWorker, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(folders, 1, math=1.0)
    make_worker().built(job)
    worker = make_worker()
    read = worker.disk.cache.read

    def drop(key: str) -> LoraAdapter | None:
        worker.merger.drop(1)
        return read(key)

    monkeypatch.setattr(worker.disk.cache, "read", drop)
    rooms = worker.begin(job)
    assert worker.next()["state"] == "dropped"
    assert all((room.a_KI == 7).all() for room in rooms.values())
    monkeypatch.setattr(worker.disk.cache, "read", lambda key: worker.merger.drop(1))  # a miss
    worker.begin(job_of(folders, 1, code=1.0), rooms)
    assert worker.next()["state"] == "dropped"
    assert all((room.a_KI == 7).all() for room in rooms.values())


@pytest.mark.parametrize("error", [BusyError("busy"), RuntimeError("whatever")])
def test_whatever_happens_to_a_read_the_adapter_is_merged(
    make_worker: MakeWorker, folders: Folders, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = job_of(folders, 1, math=1.0)
    make_worker().built(job)
    worker, calls = make_worker(), []

    def fail_once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise error
        merge_into(*args)

    monkeypatch.setattr(merger_module, "merge_into", fail_once)
    assert holds(worker.build(job), offline(folders, "cat", Term("math")))
    assert worker.last["disk"] == "miss"


def test_a_slot_that_is_given_away_while_it_is_copied_writes_nobodys_bytes_under_its_key(
    worker: Worker, folders: Folders, copying: tuple[Event, Event]
) -> None:
    begun, go_on = copying
    math, code = job_of(folders, 1, math=1.0), job_of(folders, 2, code=1.0)
    rooms = worker.begin(math)
    assert worker.next()["state"] == "done"
    assert begun.wait(10)
    worker.merger.leave(1)  # as the worker does before another takes the slot
    worker.begin(code, rooms)
    assert worker.next()["state"] == "done"
    go_on.set()
    until(lambda: code["key"] in worker.entries())
    assert worker.entries().keys() == {code["key"]}
    assert worker.disk.count("writes_total", outcome="left") == 1
    assert load_adapter(worker.entries()[code["key"]]).digest == offline(folders, "cat", Term("code")).digest


def test_a_slot_that_is_given_away_before_its_turn_to_be_copied_is_not_written(
    worker: Worker, folders: Folders, copying: tuple[Event, Event]
) -> None:
    begun, go_on = copying
    first, second = job_of(folders, 1, math=1.0), job_of(folders, 2, code=1.0)
    worker.begin(first)
    worker.next()
    assert begun.wait(10)
    worker.begin(second)
    worker.next()
    worker.merger.leave(2)
    go_on.set()
    until(lambda: worker.disk.count("writes_total", outcome="left") == 1)
    until(lambda: worker.entries().keys() == {first["key"]})


def test_a_slot_is_announced_before_anybody_can_give_it_away(worker: Worker, folders: Folders) -> None:
    job, put = job_of(folders, 1, math=1.0), worker.reports.put

    def leave_at_once(report: Any) -> None:
        worker.merger.leave(report["lora_id"])
        put(report)

    worker.merger._report = leave_at_once
    worker.begin(job)
    worker.next()
    until(lambda: worker.disk.count("writes_total", outcome="left") == 1)
    assert worker.entries() == {}


def test_merging_again_for_the_disk_waits_until_nothing_else_is_merged(
    make_worker: MakeWorker, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = Event(), Event()

    def code_waits(adapters: dict[str, LoraAdapter], *args: Any) -> None:
        if "code" in adapters:
            begun.set()
            assert go_on.wait(10)
        merge_into(adapters, *args)

    monkeypatch.setattr(merger_module, "merge_into", code_waits)
    worker, rebuilt = make_worker(whole=False), Event()
    again = worker.merger._merge_again
    monkeypatch.setattr(worker.merger, "_merge_again", lambda job: (rebuilt.set(), again(job))[1])
    worker.begin(job_of(folders, 1, code=1.0))
    assert begun.wait(10)
    job = job_of(folders, 2, math=1.0)
    worker.begin(job)
    assert worker.next()["lora_id"] == 2
    assert not rebuilt.wait(0.1)
    go_on.set()
    until(lambda: job["key"] in worker.entries())


def test_more_than_the_disk_can_take_is_dropped_and_served_all_the_same(
    worker: Worker, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = Event()
    monkeypatch.setattr(worker.disk.cache, "_write", lambda key, adapter: go_on.wait(10))
    for number in range(8):
        rooms = worker.begin(job_of(folders, number + 1, math=1.0 + number))
        assert worker.next()["state"] == "done"
        assert holds(rooms, offline(folders, "cat", Term("math", 1.0 + number)))
    until(lambda: not worker.tier._keeper._staying)
    assert worker.disk.count("writes_total", outcome="dropped") >= 2
    go_on.set()


def test_a_worker_that_does_not_write_reads(make_worker: MakeWorker, folders: Folders) -> None:
    job = job_of(folders, 1, math=1.0)
    reader = make_worker(writes=False)
    reader.build(job)
    assert reader.entries() == {}
    make_worker().built(job)
    assert holds(reader.build(job), offline(folders, "cat", Term("math")))
    assert reader.last["disk"] == "hit"


def test_what_cannot_be_copied_is_counted_and_the_next_one_is_written(
    worker: Worker, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(merger_module, "copy_of", fail)
        worker.build(job_of(folders, 1, math=1.0))
        assert worker.disk.count("errors_total", operation="copy", kind="bug") == 1
    worker.built(job_of(folders, 2, code=1.0))


def test_the_times_of_a_workers_own_builds_decide(tmp_path: Path, folders: Folders) -> None:
    disk = Cache(tmp_path / "cache", PLENTY)
    tier = DiskTier(disk.cache, disk.metrics, CPU, writes=True, whole=True)
    worker = Bench(disk=tier)
    worker.begin(job_of(folders, 1, math=1.0, code=1.0))
    assert worker.next()["disk"] == "miss"  # its sources were not in memory
    assert tier._estimates._merges["cat", 2]
    assert tier._estimates._loads
    tier._estimates._loads.append(0.0)  # a disk that takes no time
    worker.begin(job_of(folders, 2, math=2.0, code=1.0))
    assert worker.next()["disk"] == "miss"
    tier._estimates._loads.clear()
    tier._estimates._loads.append(1.0)  # a second a byte
    worker.begin(job_of(folders, 3, math=3.0, code=1.0))
    assert worker.next()["disk"] is None
    disk.cache.close()
