"""The Engine that the composer builds in, over vLLM's `collective_rpc` to LoramixWorker."""

import asyncio
import dataclasses
import platform
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from merging import AdapterError, LoramixError, RecipeError
from server.catalog import Recipe
from server.disk_metrics import Figures
from server.engine import EngineFacts, Resident
from server.errors import ConfigError, EngineDiedError, OutOfMemoryError
from server.job import Job
from server.merger import OUT_OF_MEMORY
from server.reports import Fault, Report, Reports
from server.request_facts import current

_T = TypeVar("_T")
_MAX_ID = 2**31 - 1  # vLLM's model runners keep LoRA ids in 32 bits
_LOOK_SECONDS = 1.0  # between two looks at whether the engine lives, while it has not answered


class VllmEngine:
    """Builds recipes in vLLM's workers. To be made on the event loop.

    Args:
        client: vLLM's engine client.
        requests: the table in which vLLM's handlers look up a request's `model`.
        show: called with the figures of the workers' disk caches whenever they change.
    """

    def __init__(self, client: EngineClient, requests: dict[str, LoRARequest], show: Callable[[Figures], None]) -> None:
        self._client = client
        self._requests = requests
        self._reports = Reports(show)
        self._workers = 0
        self._slot_bytes = 0  # of all workers together
        self._ids: set[int] = set()  # of what is being built or resident
        self._last_id = 0

    async def setup(self, host_bytes: int, device_bytes: int, cache_dir: Path | None, cache_bytes: int) -> EngineFacts:
        """Get the workers ready, and learn what they can hold.

        Args:
            host_bytes, device_bytes: for source adapters, in each worker.
            cache_dir, cache_bytes: of the disk cache, if there is to be one.

        Raises:
            ConfigError: where vLLM runs without LoRA or without the worker extension, or in a way that loramix cannot serve.
                See server/survey.py for why float16 on the CPU is one.
        """
        if self._client.vllm_config.lora_config is None:
            raise ConfigError("vLLM runs without LoRA; start it with --enable-lora")
        try:
            folder = None if cache_dir is None else str(cache_dir)
            facts = await self._call("loramix_setup", self._reports.address, host_bytes, device_bytes, folder, cache_bytes)
        except Exception as error:  # vLLM raises a bare one for whatever a worker raised
            raise ConfigError(
                f"the worker extension does not answer ({error}); "
                "start vLLM with --worker-extension-cls server.vllm_worker.LoramixWorker"
            ) from error
        for each in facts:
            if "error" in each:
                raise ConfigError(each["error"])
            if each["host"] != platform.node():
                raise ConfigError(f"a worker runs on {each['host']}; all must run on the API server's host ({platform.node()})")
            if each["modules"].keys() != facts[0]["modules"].keys():
                raise ConfigError("--pipeline-parallel-size over 1 is not supported; use --tensor-parallel-size")
        if facts[0]["slots"] < 1:
            raise ConfigError("on the CPU one LoRA slot stays empty; start with --max-loras 2 or more")
        if facts[0]["device"] == "cpu" and str(self._client.vllm_config.model_config.dtype) == "torch.float16":
            raise ConfigError(
                "on the CPU one answer that overflows spoils others', and in float16 weights of 100 can do that; "
                "start with --dtype bfloat16"
            )
        self._workers = len(facts)
        self._slot_bytes = sum(each["slot_bytes"] for each in facts)
        return EngineFacts(
            facts[0]["modules"], facts[0]["slots"], facts[0]["max_rank"], facts[0]["dtype"], facts[0]["device"]
        )  # fmt: skip

    async def warm_up(self, default_method: str, rank: int) -> None:
        """Merge what is likely to be asked for, of adapters of `rank`, so that the first requests need not wait longer."""
        await self._call("loramix_warm_up", default_method, rank)

    async def build(self, recipe: Recipe, victim: Resident | None) -> Resident:
        if victim is not None:
            self._close(victim)
        lora_id = self._next_id()
        merge = asyncio.create_task(self._merge(recipe, lora_id, victim))
        try:
            resident = await asyncio.shield(merge)
        except asyncio.CancelledError:
            await self._call("loramix_drop", lora_id)
            await asyncio.wait((merge,))
            if merge.exception() is None:  # it had ended before it was dropped
                await self._free(lora_id)
            raise
        self._requests[recipe.name] = LoRARequest(recipe.name, lora_id, f"loramix/{recipe.key}")
        return resident

    async def evict(self, resident: Resident) -> None:
        self._close(resident)
        await self._free(resident.lora_id)

    async def forget(self, digests: Collection[str]) -> Mapping[str, int]:
        used_bytes, *_ = await self._call("loramix_forget", list(digests))
        return used_bytes  # type: ignore[no-any-return]

    async def _merge(self, recipe: Recipe, lora_id: int, victim: Resident | None) -> Resident:
        """Merge into a slot, which is free again where this raises: every worker has let go of it by then."""
        ended = self._reports.expect(lora_id, self._workers)
        try:
            await self._call("loramix_begin", _job(recipe, lora_id), None if victim is None else victim.lora_id)
            reports = await self._unless_dead(ended)
            for report in reports:
                if report["state"] != "done":
                    raise _error_of(report["fault"])
        except BaseException:
            self._reports.forget(lora_id)
            await self._free(lora_id)
            raise
        finally:
            if victim is not None:
                self._ids.discard(victim.lora_id)
        return _resident(recipe, lora_id, reports, self._slot_bytes)

    async def _free(self, lora_id: int) -> None:
        await self._call("loramix_evict", lora_id)
        self._ids.discard(lora_id)

    def _close(self, resident: Resident) -> None:
        """Take it off the table, unless its recipe has been built anew and stands there under the same name."""
        request = self._requests.get(resident.recipe.name)
        if request is not None and request.lora_int_id == resident.lora_id:
            del self._requests[resident.recipe.name]

    def _next_id(self) -> int:
        """A LoRA id that is not in use. Ids count up: content keys do not fit them, and names carry those anyway."""
        while True:
            self._last_id = self._last_id % _MAX_ID + 1
            if self._last_id not in self._ids:
                self._ids.add(self._last_id)
                return self._last_id

    async def _call(self, method: str, *args: Any) -> list[Any]:
        replies: list[Any] = await self._unless_dead(asyncio.ensure_future(self._client.collective_rpc(method, args=args)))
        return replies

    async def _unless_dead(self, answer: asyncio.Future[_T]) -> _T:
        """What the engine answers; EngineDiedError where it never will, which vLLM tells nobody who waits."""
        try:
            while not answer.done() and not self._client.errored:
                await asyncio.wait((answer,), timeout=_LOOK_SECONDS)
            if not answer.done() or (answer.exception() is not None and self._client.errored):
                raise EngineDiedError("the engine has died, and this server ends; ask another, or try again shortly")
            return answer.result()
        finally:
            answer.cancel()


def _job(recipe: Recipe, lora_id: int) -> Job:
    return Job(
        lora_id=lora_id,
        key=recipe.key,
        nbytes=recipe.nbytes,
        request_id=None if (facts := current()) is None else facts.id,
        method=recipe.spec.method.name,
        options=dataclasses.asdict(recipe.spec.options),
        terms=[
            (term.adapter, term.plain_weight, str(source.path), source.digest, source.nbytes)
            for term, source in zip(recipe.spec.terms, recipe.sources, strict=True)
        ],
    )


def _resident(recipe: Recipe, lora_id: int, reports: list[Report], nbytes: int) -> Resident:
    """What the workers report of a merge that all of them have done: each phase as long as the slowest took."""
    phases = {phase for report in reports for phase in report["seconds"]}
    seconds = {phase: max(report["seconds"].get(phase, 0.0) for report in reports) for phase in phases}
    found = {report["disk"] for report in reports}
    disk = found.pop() if len(found) == 1 else "miss"  # one that has merged took the time of a merge
    return Resident(recipe, lora_id, seconds, nbytes, reports[0]["tiers"], disk, reports[0]["used_bytes"])


def _error_of(fault: Fault | None) -> LoramixError:
    """What a worker reported, as the error it was there."""
    if fault is None:
        return LoramixError("the merge was dropped")
    match fault["kind"]:
        case "AdapterError":
            return AdapterError(fault["message"])
        case "RecipeError":
            return RecipeError(fault["message"], fault["param"] or "adapters")
        case kind if kind == OUT_OF_MEMORY:
            return OutOfMemoryError("the device has no memory left for this merge; try again shortly, or with fewer adapters")
    return LoramixError(f"the merge failed: {fault['message']}")
