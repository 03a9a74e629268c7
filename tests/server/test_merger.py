"""The merger: jobs on helper threads, sources kept by content, and nothing served that is not what was checked."""

import time
from pathlib import Path

import pytest
import torch
from harness import tiny_adapter

from merging import AdapterError, LoraAdapter, MergeSpec, Term, load_adapter, merge, save_adapter
from server.merger import Built, Job, Merger


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(["math", "code"]):
        save_adapter(tiny_adapter(4, seed), tmp_path / name)
    return {name: tmp_path / name for name in ("math", "code")}


def job_of(folders: dict[str, Path], lora_id: int = 1, method: str = "cat", **weights: float | dict[str, float]) -> Job:
    terms = [(name, weight, str(folders[name]), load_adapter(folders[name]).digest) for name, weight in weights.items()]
    return Job(lora_id=lora_id, method=method, options={}, terms=terms)


def merger(host_bytes: int = 1 << 20) -> Merger:
    return Merger(torch.device("cpu"), "bfloat16", host_bytes)


def wait(merger: Merger, lora_id: int) -> Built:
    for _ in range(500):
        if (built := merger.poll(lora_id)) is not None:
            return built
        time.sleep(0.01)
    raise AssertionError("the merge did not end")


def offline(folders: dict[str, Path], method: str, *terms: Term) -> LoraAdapter:
    return merge({name: load_adapter(folder) for name, folder in folders.items()}, MergeSpec.create(method, terms))


def test_a_job_gives_the_bytes_of_the_same_merge_offline(folders: dict[str, Path]) -> None:
    worker = merger()
    worker.begin(job_of(folders, 7, "lego", math=0.5, code=-1.0))
    built = wait(worker, 7)
    assert built.adapter.digest == offline(folders, "lego", Term("math", 0.5), Term("code", -1.0)).digest
    assert set(built.seconds) == {"load", "merge"}


def test_weights_by_module_reach_the_merge(folders: dict[str, Path]) -> None:
    worker = merger()
    weights = {"*.q_proj": 0.25, "*": 2.0}
    worker.begin(job_of(folders, 1, "cat", math=weights, code=1.0))
    assert wait(worker, 1).adapter.digest == offline(folders, "cat", Term.of("math", weights), Term("code")).digest


def test_sources_are_read_once_while_they_fit(folders: dict[str, Path]) -> None:
    job = job_of(folders, 1, math=1.0, code=1.0)
    worker = merger()
    worker.begin(job)
    wait(worker, 1)
    for folder in folders.values():
        (folder / "adapter_model.safetensors").unlink()
    assert worker.rebuild(1) is not None  # needs no disk


def test_a_cache_too_small_for_a_source_reads_it_again(folders: dict[str, Path]) -> None:
    worker = merger(host_bytes=1)
    worker.begin(job_of(folders, 1, math=1.0))
    first = wait(worker, 1).adapter.digest
    again = worker.rebuild(1)
    assert again is not None
    assert again.digest == first
    (folders["math"] / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is missing"):
        worker.rebuild(1)


def test_a_folder_that_changed_since_it_was_checked_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    job = job_of(folders, 1, math=1.0)
    save_adapter(tiny_adapter(4, seed=99), tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").rename(folders["math"] / "adapter_model.safetensors")
    worker = merger()
    worker.begin(job)
    with pytest.raises(AdapterError, match=r"'math' .* has changed since it was checked"):
        wait(worker, 1)


def test_a_failed_job_fails_alone_and_may_be_tried_again(folders: dict[str, Path]) -> None:
    weights = folders["math"] / "adapter_model.safetensors"
    job, content = job_of(folders, 1, math=1.0), weights.read_bytes()
    weights.unlink()
    worker = merger()
    worker.begin(job)
    worker.begin(job_of(folders, 2, code=1.0))
    with pytest.raises(AdapterError):
        wait(worker, 1)
    wait(worker, 2)
    worker.drop(1)
    weights.write_bytes(content)
    worker.begin(job)
    wait(worker, 1)


def test_what_was_never_asked_for_cannot_be_rebuilt() -> None:
    assert merger().rebuild(5) is None
