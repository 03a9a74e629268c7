"""A stand-in for vLLM's client, and the engine over it."""

import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.reports import Report, Reporter

vllm_engine = pytest.importorskip("server.vllm_engine", reason="needs vLLM")
FACTS = {
    "modules": {"q_proj": (4, 4)}, "slots": 2, "slot_bytes": 5, "max_rank": 8, "dtype": "bfloat16", "device": "cpu",
    "host": platform.node(),
}  # fmt: skip


class Client:
    """Answers collective_rpc for two workers, remembers the calls, and reports merges as done unless `hold` is on."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(lora_config=object(), model_config=SimpleNamespace(dtype=torch.bfloat16))
        self.calls: list[tuple[str, Any]] = []
        self.facts = [dict(FACTS), dict(FACTS)]
        self.hold = False
        self.errored = False
        self.workers: list[Reporter] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, args))
        if method == "loramix_setup":
            self.workers = [Reporter(args[0]), Reporter(args[0])]
            return self.facts
        if method == "loramix_begin" and not self.hold:
            self.report(0, args[0]["lora_id"])
            self.report(1, args[0]["lora_id"], seconds={"commit": 0.25, "merge": 2.0})
        if method == "loramix_forget":
            return [{"host": 3}, {"host": 3}]
        return [None, None]

    def report(self, worker: int, lora_id: int, **changes: Any) -> None:
        report = Report(
            lora_id=lora_id, state="done", fault=None, seconds={"commit": 0.5, "merge": 0.5}, tiers={"disk": 1},
            disk=None, used_bytes={"host": 7},
        )  # fmt: skip
        report.update(changes)  # type: ignore[typeddict-item]
        self.workers[worker].send(report)

    def made(self, method: str) -> list[Any]:
        return [args for name, args in self.calls if name == method]


class Bench:
    def __init__(self) -> None:
        self.client = Client()
        self.requests: dict[str, Any] = {}
        self.engine = vllm_engine.VllmEngine(self.client, self.requests, lambda figures: None)

    def close(self) -> None:
        self.engine._reports.close()
        for worker in self.client.workers:
            worker.close()
