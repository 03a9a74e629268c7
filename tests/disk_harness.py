"""What the tests of the disk cache share: entries that show whose they are, and a cache with metrics of its own."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import tiny_adapter
from prometheus_client import CollectorRegistry

from merging import LoraAdapter
from server.disk_cache import DiskCache
from server.disk_entry import write_entry
from server.disk_folder import CacheFolder
from server.disk_metrics import DiskMetrics

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
KEYS = [f"{hashlib.sha256(bytes([number])).hexdigest()}.cpu-torch-2" for number in range(12)]
PLENTY = 2**30


def adapter_of(key: str) -> LoraAdapter:
    """What belongs under `key`, and nowhere else."""
    return tiny_adapter(4, int(key[:8], 16))


def is_right(key: str, adapter: LoraAdapter | None) -> bool:
    wanted = adapter_of(key).modules
    return (
        adapter is not None
        and list(adapter.modules) == sorted(wanted)
        and all(
            torch.equal(module.a, wanted[name].a) and torch.equal(module.b, wanted[name].b) and module.scaling == 1
            for name, module in adapter.modules.items()
        )
    )


def filled(path: Path, keys: list[str], most_bytes: int = PLENTY) -> CacheFolder:
    folder = CacheFolder(path, most_bytes)
    for key in keys:
        assert folder.publish(key, adapter_of(key)) is not None
    return folder


class Cache:
    """A disk cache with metrics of its own."""

    def __init__(self, path: Path, most_bytes: int = PLENTY, **options: Any) -> None:
        self.registry = CollectorRegistry()
        self.path = path
        self.metrics = DiskMetrics(self.registry)
        self.cache = DiskCache(path, most_bytes, self.metrics, **options)

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"loramix_disk_{name}", labels) or 0.0

    def writes(self) -> float:
        """Entries that the writing thread is through with, one way or another."""
        return sum(self.count("writes_total", outcome=outcome) for outcome in ("written", "present", "error"))

    def write(self, *keys: str) -> None:
        """Have them written, and wait for it."""
        before = self.writes()
        for number, key in enumerate(keys, 1):
            self.cache.write(key, adapter_of(key))
            until(lambda number=number: self.writes() == before + number)


def until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("not within 10 s")


def _entry_bytes() -> int:
    with TemporaryDirectory() as folder:
        return write_entry(Path(folder, KEYS[0]), KEYS[0], adapter_of(KEYS[0]))


ENTRY_BYTES = _entry_bytes()  # of every entry
