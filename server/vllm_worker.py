"""vLLM worker extension: merges in the worker, and puts the result into vLLM's LoRA slots between two steps.

Named to vLLM as `--worker-extension-cls server.vllm_worker.LoramixWorker`. The server calls its methods through
`collective_rpc`; none of them blocks on a merge, and none raises for what a request can cause.

loramix owns vLLM's LoRA slots: as many adapters are registered as there are slots, each registered one is active,
and only loramix adds or removes any. So vLLM itself never loads an adapter inside an engine step.
"""

import time
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from merging import LoraAdapter, LoramixError
from server.merger import Job, Merger


class LoramixWorker:
    """Mixed into vLLM's worker class; every name starts with `loramix_` to stay out of its way."""

    loramix_merger: Merger
    loramix_slots: int
    loramix_reports: dict[int, dict[str, Any]]
    loramix_guests: set[int]
    model_runner: Any
    device: Any

    def loramix_setup(self, host_bytes: int) -> dict[str, Any]:
        """Get ready to merge; returns the engine's facts (see EngineFacts)."""
        worker_manager = self.model_runner.lora_manager
        config = worker_manager.lora_config
        dtype = str(config.lora_dtype).removeprefix("torch.")
        self.loramix_merger = Merger(self.device, dtype, host_bytes)
        self.loramix_slots = _usable_slots(config.max_loras, self.device.type)
        self.loramix_reports = {}
        self.loramix_guests = set()
        worker_manager._load_adapter = self.loramix_load
        return {
            "modules": _module_shapes(worker_manager._adapter_manager),
            "slots": self.loramix_slots,
            "max_rank": config.max_lora_rank,
            "dtype": dtype,
            "device": str(self.device),
        }

    def loramix_begin(self, job: Job) -> None:
        """Start merging `job` on a helper thread."""
        self.loramix_merger.begin(job)

    def loramix_commit(self, lora_id: int, victim: int | None) -> dict[str, Any]:
        """Put a merged adapter into the slot of `victim`, or into a free one, if its merge is done.

        Calling it again once it is done changes nothing: with tensor parallelism it is called until every rank is.

        Returns:
            {"state": "pending"}, {"state": "failed", "kind", "message", "param"} or
            {"state": "done", "seconds": {phase: s}, "nbytes": bytes}.
        """
        if lora_id in self.loramix_reports:
            return self.loramix_reports[lora_id]
        try:
            built = self.loramix_merger.poll(lora_id)
            if built is None:
                return {"state": "pending"}
            started = time.perf_counter()
            manager = self.model_runner.lora_manager._adapter_manager
            for leaving in (*self.loramix_guests, victim):
                if leaving is not None:
                    self.loramix_remove(leaving)
            model = _lora_model(lora_id, built.adapter)
            manager.add_adapter(model)
            manager.activate_adapter(lora_id)
            model.loras = {}  # the slot holds the factors now
        except Exception as error:  # noqa: BLE001  (whatever a merge raises is its requests' affair, not the engine's)
            known = isinstance(error, LoramixError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            return {
                "state": "failed", "kind": type(error).__name__ if known else None, "message": message,
                "param": getattr(error, "param", None),
            }  # fmt: skip
        self.loramix_merger.drop(lora_id)
        seconds = {**built.seconds, "commit": time.perf_counter() - started}
        report = {"state": "done", "seconds": seconds, "nbytes": built.adapter.nbytes}
        self.loramix_reports[lora_id] = report
        return report

    def loramix_evict(self, lora_id: int) -> None:
        """Free the slot of an adapter and drop its merge, whichever there is."""
        self.loramix_merger.drop(lora_id)
        self.loramix_remove(lora_id)

    def loramix_remove(self, lora_id: int) -> None:
        self.loramix_reports.pop(lora_id, None)
        self.loramix_guests.discard(lora_id)
        self.model_runner.lora_manager._adapter_manager.remove_adapter(lora_id)

    def loramix_load(self, request: LoRARequest) -> LoRAModel:
        """In the place of vLLM's `_load_adapter`, which reads a folder inside the engine step.

        Leases keep this from being called. It is the net for a request that the engine still schedules after its
        client and lease are gone: its adapter is merged again, so that neither the engine nor a neighbour suffers, and
        leaves at the next commit. Where every slot is taken, the one unused for longest gives way, to come back likewise.
        """
        adapter = self.loramix_merger.rebuild(request.lora_int_id)
        if adapter is None:
            raise ValueError(f"{request.lora_name} was never merged by loramix; adapters are loaded through loramix only")
        manager = self.model_runner.lora_manager._adapter_manager
        if len(manager) >= self.loramix_slots:
            manager.remove_oldest_adapter()
        if request.lora_int_id not in self.loramix_reports:
            self.loramix_guests.add(request.lora_int_id)
        return _lora_model(request.lora_int_id, adapter)


def _usable_slots(max_loras: int, device: str) -> int:
    """The slots that adapters may take, which vLLM fills from the first on.

    On the CPU the last stays empty: vLLM's kernels there look up a token without an adapter at index −1, which is the
    last slot, so that a request for the base model would be answered with the adapter in it.
    """
    return max_loras - 1 if device == "cpu" else max_loras


def _lora_model(lora_id: int, adapter: LoraAdapter) -> LoRAModel:
    """A merged adapter as vLLM's manager takes it; alpha equals rank, since the scaling is in the factors."""
    layers = {
        name: LoRALayerWeights(name, module.rank, module.rank, module.a, module.b) for name, module in adapter.modules.items()
    }
    return LoRAModel(lora_id, adapter.rank, layers)


def _module_shapes(manager: Any) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear module that can be adapted, as one GPU alone would hold it.

    Packed modules (qkv_proj, gate_up_proj) are listed as the parts that adapters know.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in manager.modules.items():
        base: Any = getattr(layer, "base_layer", None)
        if not hasattr(base, "input_size") or not hasattr(base, "output_size"):
            continue  # embeddings, expert layers
        parts = manager.packed_modules.get(name, [name])
        if len(parts) == 1:
            sizes = [base.output_size]
        elif hasattr(base, "total_num_kv_heads"):
            key_size = base.total_num_kv_heads * base.head_size
            sizes = [base.total_num_heads * base.head_size, key_size, key_size]
        else:
            sizes = list(base.output_sizes)
        if len(sizes) == len(parts):
            shapes.update({part: (size, base.input_size) for part, size in zip(parts, sizes, strict=True)})
    return shapes
