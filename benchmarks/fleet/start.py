"""What an adapter costs a server before anybody asks for it, and what reading it costs: measured, with the server's own code.

Adapters have the modules of an 8B model (224). Full ones have its widths too, and are read from the page cache: what a disk
takes comes on top. Small ones have narrow modules, so that what does not depend on the bytes shows.
"""

import gc
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.adapters import random_adapter
from merging import save_adapter
from merging.peft_folder import WEIGHTS
from server.catalog import Catalog
from server.reader import SourceFile
from server.shapes import ModelShape
from server.survey import survey

T = TypeVar("T")

RANK = 16
_FULL = ModelShape.named("llama-8b")
_SMALL = ModelShape(layers=_FULL.layers, hidden=32, query=32, kv=16, mlp=64)


@dataclass(frozen=True)
class Counts:
    """How many of what: adapters of full size, and small ones."""

    full: int
    small: int


def measure(counts: Counts, work: Path) -> dict[str, float]:
    """Figures by name, with one thread. Times are the processor's, the shortest ones: what else runs there does not count.

    `read_ms`: to read and check an adapter of full size, as a merge does.
    `check_ms`, `check_small_ms`: to survey one before the server starts.
    `catalog_kib`: memory for each adapter, once it is in the catalog.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(counts, work)
    finally:
        torch.set_num_threads(threads)


def _measure(counts: Counts, work: Path) -> dict[str, float]:
    full = _written(_FULL, counts.full, work / "full")
    small = _written(_SMALL, counts.small, work / "small")
    half = counts.small // 2
    checks, reads = [], []
    for path in full:
        (path / WEIGHTS).read_bytes()  # so that the page cache has it
        seconds, digest = _timed(lambda path=path: survey(path).digest)
        checks.append(seconds)
        source = SourceFile(path.name, str(path), digest)
        reads += [_timed(source.read)[0] for _ in range(3)]
    narrow = [_timed(lambda path=path: survey(path))[0] for path in small[:half]]
    return {
        "read_ms": 1e3 * min(reads),
        "check_ms": 1e3 * min(checks),
        "check_small_ms": 1e3 * min(narrow),
        "catalog_kib": _catalog_bytes(small[half:]) / 1024,
    }


def _catalog_bytes(folders: list[Path]) -> float:
    """Memory that stays for each adapter in a catalog, what a survey keeps included; none has been surveyed before."""
    modules = {
        f"model.layers.{layer}.{name}": sizes for layer in range(_SMALL.layers) for name, sizes in _SMALL.linears.items()
    }
    catalog = Catalog(modules, RANK, "bfloat16", frozenset())
    catalog.add(folders[0].name, folders[0])  # what is made once does not count
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for folder in folders[1:]:
            catalog.add(folder.name, folder)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / (len(folders) - 1)
    finally:
        tracemalloc.stop()


def _written(shape: ModelShape, count: int, folder: Path) -> list[Path]:
    paths = [folder / f"a{number}" for number in range(count)]
    for seed, path in enumerate(paths):
        save_adapter(random_adapter(shape, RANK, seed, torch.device("cpu")), path)
    return paths


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the processor, and what came of it."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result
