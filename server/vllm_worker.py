"""vLLM worker extension: merges in the worker, beside decoding, into vLLM's LoRA slots.

Named to vLLM as `--worker-extension-cls server.vllm_worker.LoramixWorker`. The server calls its methods through
`collective_rpc`, which runs them in the engine's thread between two steps; none of them waits for a merge, and none
raises for what a request can cause.

loramix owns vLLM's LoRA slots: as many adapters are registered as there are slots, each registered one is active,
and only loramix adds or removes any. So vLLM itself never loads an adapter inside an engine step.
"""

import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from merging import LoraAdapter, LoramixError
from server.disk_cache import DiskCache
from server.disk_metrics import DiskMetrics, figures_of
from server.disk_tier import DiskTier
from server.errors import ConfigError
from server.job import Job
from server.merger import Merger
from server.reports import Reporter
from server.start_fault import first_line
from server.store import AdapterStore
from server.vllm_slots import Slots
from server.warm_up import likely_adapter, likely_specs

_WARM_UP_ID = 2**31 - 1  # of what is in a slot while no request can be
logger = logging.getLogger("vllm.loramix")


class LoramixWorker:
    """Mixed into vLLM's worker class; every name starts with `loramix_` to stay out of its way."""

    loramix_merger: Merger
    loramix_slots: Slots
    loramix_owned: set[int]  # ids that the server counts: being merged, or resident
    model_runner: Any
    device: Any
    rank: int

    def loramix_setup(
        self, address: str, host_bytes: int, device_bytes: int, cache_dir: str | None, cache_bytes: int
    ) -> dict[str, Any]:
        """Get ready to merge; returns what this worker is like, or {"error": why it cannot}.

        Args:
            address: where merges are reported to.
            host_bytes, device_bytes: for source adapters, see AdapterStore.
            cache_dir, cache_bytes: of the disk cache, if there is to be one.
        """
        worker_manager = self.model_runner.lora_manager
        config = worker_manager.lora_config
        try:
            if config.fully_sharded_loras:
                raise ConfigError("--fully-sharded-loras is not supported; start without it")
            self.loramix_slots = Slots(worker_manager._adapter_manager, self.device)
        except LoramixError as error:
            return {"error": str(error)}
        try:
            store = AdapterStore(self.device, host_bytes, device_bytes)
        except (MemoryError, RuntimeError) as error:  # torch raises the latter where host memory is short
            reason = first_line(error)
            return {"error": f"no memory for source adapters ({reason}); lower --adapter-host-gib or --adapter-gpu-gib"}
        dtype = str(config.lora_dtype).removeprefix("torch.")
        reporter = Reporter(address)
        disk = None if cache_dir is None else _disk_tier(Path(cache_dir), cache_bytes, self, reporter)
        self.loramix_merger = Merger(self.device, dtype, store, reporter.send, disk)
        self.loramix_owned = set()
        worker_manager._load_adapter = self.loramix_load
        return {
            "modules": self.loramix_slots.shapes,
            "slots": len(self.loramix_slots),
            "slot_bytes": self.loramix_slots.nbytes,
            "max_rank": config.max_lora_rank,
            "dtype": dtype,
            "device": str(self.device),
            "host": platform.node(),
        }

    def loramix_warm_up(self, default_method: str, rank: int) -> None:
        """Merge what is likely to be asked for, before the first request; returns when that is done."""
        if self.device.type != "cuda":
            return
        worker_manager = self.model_runner.lora_manager
        shapes, config = self.loramix_slots.shapes, worker_manager.lora_config
        adapter = likely_adapter(shapes, rank, config.lora_dtype, self.device)
        torch.cuda.current_stream(self.device).synchronize()  # it is merged on another stream
        specs = likely_specs(default_method, dict.fromkeys(shapes, rank), config.max_lora_rank)
        self.loramix_merger.warm_up(adapter, specs, self.loramix_slots.take(_WARM_UP_ID))
        self.loramix_slots.free(_WARM_UP_ID)

    def loramix_begin(self, job: Job, victim: int | None) -> None:
        """Give the slot of `victim`, or a free one, to the job, and start merging into it on a helper thread."""
        started = time.perf_counter()
        if victim is not None:
            self.loramix_evict(victim)
        for lora_id in self.loramix_slots.taken:
            if lora_id not in self.loramix_owned:  # see loramix_load
                self.loramix_slots.free(lora_id)
        self.loramix_owned.add(job["lora_id"])
        self.loramix_merger.begin(job, self.loramix_slots.take(job["lora_id"]), started)

    def loramix_drop(self, lora_id: int) -> None:
        """Have a merge end at its next phase, if it is under way. Its slot stays taken until `loramix_evict`."""
        self.loramix_merger.drop(lora_id)

    def loramix_evict(self, lora_id: int) -> None:
        """Free the slot of an adapter. The server calls this once its merge has ended; were it not so, this would wait."""
        self.loramix_merger.leave(lora_id)
        self.loramix_owned.discard(lora_id)
        self.loramix_slots.free(lora_id)

    def loramix_forget(self, digests: list[str]) -> dict[str, int]:
        """Free the memory of source adapters, at once: it is bookkeeping alone. Returns what the others take up, by tier."""
        return self.loramix_merger.forget(digests)

    def loramix_load(self, request: LoRARequest) -> LoRAModel:
        """In the place of vLLM's `_load_adapter`, which reads a folder inside the engine step.

        Leases keep this from being called. It is the net for a request that the engine still schedules after its
        client and lease are gone: its adapter is merged again, so that neither the engine nor a neighbour suffers, and
        leaves when the next merge begins. Where every slot is taken, the one unused for longest gives way, to come back
        in the same way.
        """
        lora_id = request.lora_int_id
        while len(taken := self.loramix_slots.taken) >= len(self.loramix_slots):
            self.loramix_merger.leave(taken[0])  # its slot must not be written any more
            self.loramix_slots.free(taken[0])
        try:
            adapter = self.loramix_merger.rebuild(lora_id)
        except Exception:
            # Nobody waits for this request, and an error here would end the engine: it goes on with the base model.
            logger.exception("%s could not be merged again", request.lora_name)
            return LoRAModel(lora_id, 1, {})
        if adapter is None:
            raise ValueError(f"{request.lora_name} was never merged by loramix; adapters are loaded through loramix only")
        return _lora_model(lora_id, adapter)


def _disk_tier(folder: Path, most_bytes: int, worker: LoramixWorker, reporter: Reporter) -> DiskTier:
    registry = CollectorRegistry()  # nobody exports a worker's own
    metrics = DiskMetrics(registry)
    cache = DiskCache(folder, most_bytes, metrics, changed=lambda: reporter.send(figures_of(worker.rank, registry)))
    return DiskTier(cache, metrics, worker.device, writes=worker.rank == 0, whole=worker.loramix_slots.whole)


def _lora_model(lora_id: int, adapter: LoraAdapter) -> LoRAModel:
    """A merged adapter as vLLM's manager takes it; alpha equals rank, since the scaling is in the factors."""
    layers = {
        name: LoRALayerWeights(name, module.rank, module.rank, module.a, module.b) for name, module in adapter.modules.items()
    }
    return LoRAModel(lora_id, adapter.rank, layers)
