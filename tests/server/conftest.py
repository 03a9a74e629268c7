"""Fixtures of the server's unit tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from access_harness import ADMIN, FILE, app_of
from fastapi.testclient import TestClient
from harness import MODULES, Gate, Harness, tiny_adapter

from merging import save_adapter
from server import disk_tier
from server.catalog import Catalog
from server.keys import Keys


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """math and code of rank 4, style of rank 2 on one module only; merged ranks up to 8; base model `tiny`."""
    catalog = Catalog(MODULES, max_rank=8, dtype="bfloat16", reserved=frozenset({"tiny"}))
    for seed, (name, rank, modules) in enumerate(
        [("math", 4, MODULES), ("code", 4, MODULES), ("style", 2, {"model.layers.0.q_proj": (12, 8)})]
    ):
        save_adapter(tiny_adapter(rank, seed, modules), tmp_path / name)
        catalog.add(name, tmp_path / name)
    return catalog


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr("server.merger.merge_into", gate.merge_into)
    yield gate
    gate.go_on.set()


@pytest.fixture
def make_harness(catalog: Catalog) -> Callable[..., Harness]:
    def make(slots: int = 2, hold: bool = False, timeout: float = 5.0, **options: Any) -> Harness:
        return Harness(catalog, slots, hold, timeout, **options)

    return make


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(["math", "code"]):
        save_adapter(tiny_adapter(4, seed), tmp_path / name)
    part = {name: MODULES[name] for name in list(MODULES)[:1]}
    save_adapter(tiny_adapter(2, 5, part), tmp_path / "part")
    return {name: tmp_path / name for name in ("math", "code", "part")}


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Event, Event]]:
    """Copies from slots wait in the middle: (begun, go on)."""
    begun, go_on = Event(), Event()
    copied = disk_tier._copied

    def wait(factor: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert go_on.wait(10)
        return copied(factor)

    monkeypatch.setattr(disk_tier, "_copied", wait)
    yield begun, go_on
    go_on.set()


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of whoever runs the tests are none of theirs."""
    for name in ("LORAMIX_API_KEY", "LORAMIX_ADMIN_KEY", "LORAMIX_KEYS_FILE", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_client(make_harness: Callable[..., Harness], tmp_path: Path) -> Callable[..., TestClient]:
    """Clients of servers with a keys file of that text, or without keys; options as in app_of."""

    def make(text: str | None, **options: Any) -> TestClient:
        path = tmp_path / "keys.toml"
        if text is not None:
            path.write_text(text)
            path.chmod(0o600)
        return TestClient(app_of(make_harness(), Keys(path if text is not None else None), **options))

    return make


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> TestClient:
    """A client of a server with all of access_harness's keys."""
    return make_client(FILE + ADMIN)
