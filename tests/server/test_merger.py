"""The merger: merges on helper threads straight into given room, reported by the thread that ran them, whatever happens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Gate, tiny_adapter
from merger_harness import Bench, holds, job_of, offline, used_rooms

from merging import LoraAdapter, MergeSpec, Term, load_adapter, merge, save_adapter
from server import merger as merger_module
from server.errors import BusyError
from server.reports import Report
from server.request_facts import current


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_job_gives_the_bytes_of_the_same_merge_offline(bench: Bench, folders: dict[str, Path]) -> None:
    rooms = bench.begin(job_of(folders, 7, "lego", math=0.5, code=-1.0))
    report = bench.next()
    assert (report["lora_id"], report["state"], report["fault"]) == (7, "done", None)
    assert set(report["seconds"]) == {"commit", "queue", "load", "copy", "merge"}
    assert report["tiers"] == {"disk": 2}
    assert report["used_bytes"]["host"] > 0
    assert holds(rooms, offline(folders, "lego", Term("math", 0.5), Term("code", -1.0)))


def test_weights_by_module_reach_the_merge(bench: Bench, folders: dict[str, Path]) -> None:
    weights = {"*.q_proj": 0.25, "*": 2.0}
    rooms = bench.begin(job_of(folders, 1, "cat", math=weights, code=1.0))
    bench.next()
    assert holds(rooms, offline(folders, "cat", Term.of("math", weights), Term("code")))


def test_room_that_a_recipe_does_not_touch_becomes_zeros(bench: Bench, folders: dict[str, Path]) -> None:
    rooms = bench.begin(job_of(folders, 1, part=1.0))
    bench.next()
    assert holds(rooms, offline(folders, "cat", Term("part")))


def test_sources_are_read_once_while_they_fit(bench: Bench, folders: dict[str, Path]) -> None:
    first, second = (job_of(folders, lora_id, math=1.0, code=float(lora_id)) for lora_id in (1, 2))
    bench.begin(first)
    bench.next()
    for folder in folders.values():
        (folder / "adapter_model.safetensors").unlink()
    bench.begin(second)
    assert (report := bench.next())["state"] == "done"
    assert report["tiers"] == {"host": 2}


def test_begin_returns_at_once_and_merges_overlap(bench: Bench, folders: dict[str, Path], gate: Gate) -> None:
    gate.close()
    bench.begin(job_of(folders, 1, math=1.0))
    assert gate.begun.wait(10)
    gate.begun.clear()
    bench.begin(job_of(folders, 2, code=1.0))
    assert gate.begun.wait(10)
    assert bench.reports.empty()
    gate.go_on.set()
    assert {bench.next()["lora_id"], bench.next()["lora_id"]} == {1, 2}


def test_a_folder_that_changed_since_it_was_checked_is_refused(bench: Bench, folders: dict[str, Path], tmp_path: Path) -> None:
    job = job_of(folders, 1, math=1.0)
    save_adapter(tiny_adapter(4, seed=99), tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").rename(folders["math"] / "adapter_model.safetensors")
    bench.begin(job)
    report = bench.next()
    assert report["state"] == "failed"
    assert report["fault"] is not None
    assert report["fault"]["kind"] == "AdapterError"
    assert "'math'" in report["fault"]["message"]
    assert "has changed since it was checked" in report["fault"]["message"]


def test_a_failed_job_fails_alone_and_may_be_tried_again(bench: Bench, folders: dict[str, Path]) -> None:
    weights = folders["math"] / "adapter_model.safetensors"
    job, other, content = job_of(folders, 1, math=1.0), job_of(folders, 2, code=1.0), weights.read_bytes()
    weights.unlink()
    bench.begin(job)
    bench.begin(other)
    assert {(report["lora_id"], report["state"]) for report in (bench.next(), bench.next())} == {(1, "failed"), (2, "done")}
    weights.write_bytes(content)
    bench.begin(job)
    assert bench.next()["state"] == "done"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemory", "CUDA out of memory"),
        (MemoryError("no"), "OutOfMemory", "no"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError", "ZeroDivisionError: by zero"),
        (BusyError("busy"), "BusyError", "busy"),
    ],
)
def test_whatever_a_merge_raises_is_reported_and_the_next_one_goes_on(
    bench: Bench, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, message: str
) -> None:
    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(merger_module, "merge_into", fail)
        for lora_id in (1, 2, 3):  # more than there are threads
            bench.begin(job_of(folders, lora_id, math=1.0))
            report = bench.next()
            assert (report["state"], report["fault"]) == ("failed", {"kind": kind, "message": message, "param": None})
    bench.begin(job_of(folders, 4, math=1.0))
    assert bench.next()["state"] == "done"


def test_lines_of_a_merge_are_of_the_request_that_began_it(
    bench: Bench, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str | None] = []

    def fail(*args: Any) -> None:
        said.append(None if (facts := current()) is None else facts.id)
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(merger_module, "merge_into", fail)
    for lora_id, request_id in enumerate(("one", None, "two", "three", None), 1):  # more than there are threads
        bench.begin({**job_of(folders, lora_id, math=1.0), "request_id": request_id})
        bench.next()
    assert said == ["one", None, "two", "three", None]


def test_a_dropped_merge_ends_before_its_next_phase(bench: Bench, folders: dict[str, Path], gate: Gate) -> None:
    gate.close()
    for lora_id in (1, 2):  # both threads are at work
        bench.begin(job_of(folders, lora_id, math=1.0))
    assert gate.begun.wait(10)
    rooms = bench.begin(job_of(folders, 3, code=1.0))
    bench.merger.drop(3)
    bench.merger.drop(99)  # never begun
    gate.go_on.set()
    reports = {report["lora_id"]: report for report in (bench.next(), bench.next(), bench.next())}
    assert [reports[lora_id]["state"] for lora_id in (1, 2, 3)] == ["done", "done", "dropped"]
    assert reports[3]["tiers"] == {}  # it has not read its source
    assert all((room.a_KI == 7).all() for room in rooms.values())


def test_a_merge_that_is_dropped_while_it_reads_is_not_merged(
    bench: Bench, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: str) -> LoraAdapter:
        bench.merger.drop(1)
        return load_adapter(folder)

    monkeypatch.setattr("server.reader.read_adapter", load)
    rooms = bench.begin(job_of(folders, 1, math=1.0))
    report = bench.next()
    assert (report["state"], report["tiers"]) == ("dropped", {"disk": 1})
    assert all((room.a_KI == 7).all() for room in rooms.values())


def test_a_slot_is_let_go_before_the_report_and_not_before_the_last_write(folders: dict[str, Path], gate: Gate) -> None:
    gate.close()
    bench = Bench()

    def report(report: Report) -> None:
        bench.merger.leave(report["lora_id"])  # for ever, were the slot still in its hands
        bench.reports.put(report)

    bench.merger._report = report
    rooms = bench.begin(job_of(folders, 1, math=1.0))
    assert gate.begun.wait(10)
    bench.merger.drop(1)  # too late
    gate.go_on.set()
    bench.merger.leave(1)
    assert holds(rooms, offline(folders, "cat", Term("math")))
    assert bench.next()["state"] == "done"


def test_a_job_of_the_past_can_be_merged_again_into_memory_of_its_own(bench: Bench, folders: dict[str, Path]) -> None:
    bench.begin(job_of(folders, 1, math=1.0, code=0.5))
    bench.next()
    again = bench.merger.rebuild(1)
    assert again is not None
    assert again.digest == offline(folders, "cat", Term("math"), Term("code", 0.5)).digest
    assert bench.merger.rebuild(5) is None  # never asked for


def test_warming_up_merges_every_recipe(bench: Bench) -> None:
    specs = [MergeSpec.create(method, [Term("one"), Term("two")]) for method in ("cat", "svd")]
    adapter, rooms = tiny_adapter(4, 0), used_rooms()
    bench.merger.warm_up(adapter, specs, rooms)
    assert holds(rooms, merge({"one": adapter, "two": adapter}, specs[-1]))
