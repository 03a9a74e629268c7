"""A worker killed at any moment of merging, reading and writing: the next one serves no wrong byte."""

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.synchronize import Event as ProcessEvent
from pathlib import Path

from merger_harness import Worker, holds, job_of, offline

from merging import Rooms, Term

WEIGHTS = [number / 4 for number in range(1, 13)]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "server.merger"])  # what takes long to import


def is_right(rooms: Rooms, folders: dict[str, Path], weight: float) -> bool:
    return holds(rooms, offline(folders, "cat", Term("math", weight), Term("code")))


def serve(path: Path, folders: dict[str, Path], most_bytes: int, seed: int, begun: ProcessEvent) -> None:
    """Merge and read for ever, without waiting for what is being written; ends where anything comes out wrong."""
    worker, random_, lora_id = Worker(path, most_bytes), random.Random(seed), 0
    while True:
        lora_id += 1
        weight = random_.choice(WEIGHTS)
        rooms = worker.begin(job_of(folders, lora_id, math=weight, code=1.0))
        if worker.next()["state"] != "done" or not is_right(rooms, folders, weight):
            sys.exit(3)
        begun.set()


def test_a_worker_killed_at_any_moment_leaves_the_next_one_nothing_wrong(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cache"
    jobs = {weight: job_of(folders, 1, math=weight, code=1.0) for weight in WEIGHTS}
    first = Worker(path)
    first.built(jobs[WEIGHTS[0]])
    most_bytes = 4 * sum(file.stat().st_size for file in first.entries()[jobs[WEIGHTS[0]]["key"]].iterdir())
    first.disk.cache.close()
    random_, cut_short, read = random.Random(0), 0, 0
    for seed in range(50):
        begun = processes.Event()
        process = processes.Process(target=serve, args=(path, folders, most_bytes, seed, begun), daemon=True)
        process.start()
        assert begun.wait(20)
        time.sleep(random_.uniform(0, 0.05))
        assert process.is_alive(), "it served something wrong"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        cut_short += any(file.name != "lock" for folder in path.glob(".server-*") for file in folder.iterdir())
        worker = Worker(path, most_bytes)
        for weight, job in jobs.items():
            if job["key"] in worker.entries():
                assert is_right(worker.build(job), folders, weight)
                read += worker.last["disk"] == "hit"
        assert worker.disk.count("reads_total", result="corrupt") == 0
        worker.disk.cache.close()
    assert cut_short > 10  # most were killed while they wrote
    assert read > 100
