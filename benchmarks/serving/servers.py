"""The servers that are measured, as one table, and starting several of them side by side."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.stage import Scale, Stage
from server.process import ServerProcess, StartError

BASE = "base"  # the name that every server has for the model without adapters
_LORAMIX = [sys.executable, "-c", "from server.cli import main; main()"]
_DUAL = {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}
_SINGLE = {"VLLM_LORA_ENABLE_DUAL_STREAM": "0"}


@dataclass(frozen=True)
class Setup:
    """One server.

    Attributes:
        kind: `loramix`; `vllm`, vLLM's own server with LoRA of the same settings; `bare`, without LoRA.
        ranks: `--max-lora-rank`, in ranks of an adapter.
        tuned: with tuned LoRA kernel configurations, where there are any.
        environment: beside that of all servers.
        gpu_options: beside those of its kind, on a GPU.
    """

    kind: str
    ranks: int = 1
    tuned: bool = True
    environment: Mapping[str, str] = field(default_factory=lambda: _DUAL)
    gpu_options: tuple[str, ...] = ()


SETUPS = {
    "loramix": Setup("loramix"),
    "vllm": Setup("vllm"),
    "loramix-2": Setup("loramix", ranks=2),
    "loramix-4": Setup("loramix", ranks=4),
    "base": Setup("bare", tuned=False, environment={}),
    "lora": Setup("vllm", tuned=False, environment=_SINGLE),
    "lora_dual": Setup("vllm", tuned=False),
    "lora_dual_tuned": Setup("vllm"),  # as loramix sets it
    "lora_dual_tuned_specialized": Setup("vllm", gpu_options=("--specialize-active-lora",)),
}


@dataclass(frozen=True)
class Machine:
    """Where it runs: `cuda` or `cpu`, and the folder of tuned configurations, if any."""

    device: str
    tuned: Path | None

    def environment(self, setup: Setup) -> dict[str, str]:
        common = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        folder = {"VLLM_TUNED_CONFIG_FOLDER": str(self.tuned)} if setup.tuned and self.tuned else {}
        own = setup.environment if self.device == "cuda" else {"VLLM_CPU_KVCACHE_SPACE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name != "VLLM_TUNED_CONFIG_FOLDER"}
        return {**inherited, **common, **folder, **own}

    def command(self, setup: Setup, stage: Stage, scale: Scale) -> list[str]:
        """The command line of a server."""
        if setup.kind == "loramix":
            words = [*_LORAMIX, "serve", str(stage.model), "--adapters", str(stage.adapters)]
            if self.device == "cuda":
                words += ["--adapter-gpu-gib", "2", "--adapter-host-gib", "8"]
        else:
            words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(stage.model)]
        words += ["--served-model-name", BASE, "--max-model-len", str(scale.length), "--max-num-seqs", str(2 * scale.clients)]
        if self.device == "cuda":
            # Several servers share the GPU: each is told how much it may take for its cache, rather than look at what is free.
            words += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(3 << 30)]
        if stage.dummy:
            words += ["--load-format", "dummy"]
        if setup.kind != "bare":
            words += ["--max-loras", str(scale.slots), "--max-lora-rank", str(setup.ranks * scale.rank)]
        if setup.kind == "vllm":
            targets = sorted(name.rpartition(".")[2] for name in stage.shape.linears)
            words += ["--enable-lora", "--max-cpu-loras", str(scale.slots), "--lora-target-modules", *targets]
            words += ["--lora-modules", *(f"v{i}={stage.merged / f'v{i}'}" for i in range(scale.voices))]
        return [*words, *(setup.gpu_options if self.device == "cuda" else ())]

    def alike(self, stage: Stage, scale: Scale) -> dict[str, str]:
        """For each setup the first that is started in the same way; one server does for both."""
        first: dict[str, str] = {}
        return {
            name: first.setdefault(repr((self.command(setup, stage, scale), self.environment(setup))), name)
            for name, setup in SETUPS.items()
        }

    def at_once(self, stage: Stage) -> int:
        """How many servers fit side by side: their weights in bfloat16 and 7 GiB each for all else; two on a CPU."""
        if self.device == "cpu":
            return 2
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        return max(1, int(0.95 * total / (2 * stage.shape.parameters + (7 << 30))))


@contextlib.contextmanager
def running(
    names: Sequence[str], machine: Machine, stage: Stage, scale: Scale, logs: Path
) -> Iterator[tuple[dict[str, ServerProcess], dict[str, StartError]]]:
    """Start servers at once; inside, those that came up answer, and for the others there is what they said last."""
    logs.mkdir(parents=True, exist_ok=True)
    processes = {
        name: ServerProcess(
            machine.command(SETUPS[name], stage, scale), logs / f"{name}.log", machine.environment(SETUPS[name])
        )
        for name in names
    }
    up: dict[str, ServerProcess] = {}
    failed: dict[str, StartError] = {}
    with ThreadPoolExecutor(len(processes)) as pool:
        try:
            for name, start in [(name, pool.submit(process.__enter__)) for name, process in processes.items()]:
                try:
                    up[name] = start.result()
                except StartError as error:
                    failed[name] = error
            yield up, failed
        finally:
            list(pool.map(lambda process: process.stop(), up.values()))
