"""The Engine that the composer builds in, over vLLM's `collective_rpc` to LoramixWorker."""

import asyncio
import dataclasses
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from merging import AdapterError, LoramixError, RecipeError
from server.catalog import Recipe
from server.engine import EngineFacts, Resident
from server.errors import ConfigError
from server.merger import Job

_MAX_ID = 2**31 - 1  # vLLM's model runners keep LoRA ids in 32 bits
_POLL_SECONDS = (0.002, 0.02)  # first and longest pause between two looks at a running merge


class VllmEngine:
    """Builds recipes in vLLM's workers.

    Args:
        client: vLLM's engine client.
        requests: the table in which vLLM's handlers look up a request's `model`.
    """

    def __init__(self, client: EngineClient, requests: dict[str, LoRARequest]) -> None:
        self._client = client
        self._requests = requests
        self._ids: set[int] = set()  # of what is being built or resident
        self._last_id = 0

    async def setup(self, host_bytes: int) -> EngineFacts:
        """Get the workers ready, and learn what they can hold.

        Raises:
            ConfigError: where vLLM runs without LoRA or without the worker extension.
        """
        if self._client.vllm_config.lora_config is None:
            raise ConfigError("vLLM runs without LoRA; start it with --enable-lora")
        try:
            facts = await self._call("loramix_setup", host_bytes)
        except Exception as error:  # vLLM raises a bare one for whatever a worker raised
            raise ConfigError(
                f"the worker extension does not answer ({error}); "
                "start vLLM with --worker-extension-cls server.vllm_worker.LoramixWorker"
            ) from error
        if facts[0]["slots"] < 1:
            raise ConfigError("on the CPU one LoRA slot stays empty; start with --max-loras 2 or more")
        modules = {name: (d_out, d_in) for each in facts for name, (d_out, d_in) in each["modules"].items()}
        return EngineFacts(modules, facts[0]["slots"], facts[0]["max_rank"], facts[0]["dtype"], facts[0]["device"])

    async def build(self, recipe: Recipe, victim: Resident | None) -> Resident:
        if victim is not None:
            self._close(victim)
        lora_id = self._next_id()
        try:
            await self._call("loramix_begin", _job(recipe, lora_id))
            resident = await self._commit(recipe, lora_id, None if victim is None else victim.lora_id)
        except BaseException:
            await self._free(lora_id)
            raise
        if victim is not None:
            self._ids.discard(victim.lora_id)
        self._requests[recipe.name] = LoRARequest(recipe.name, lora_id, f"loramix/{recipe.key}")
        return resident

    async def evict(self, resident: Resident) -> None:
        self._close(resident)
        await self._free(resident.lora_id)

    def _close(self, resident: Resident) -> None:
        """Take it off the table, unless its recipe has been built anew and stands there under the same name."""
        request = self._requests.get(resident.recipe.name)
        if request is not None and request.lora_int_id == resident.lora_id:
            del self._requests[resident.recipe.name]

    async def _free(self, lora_id: int) -> None:
        await self._call("loramix_evict", lora_id)
        self._ids.discard(lora_id)

    def _next_id(self) -> int:
        """A LoRA id that is not in use. Ids count up: content keys do not fit them, and names carry those anyway."""
        while True:
            self._last_id = self._last_id % _MAX_ID + 1
            if self._last_id not in self._ids:
                self._ids.add(self._last_id)
                return self._last_id

    async def _commit(self, recipe: Recipe, lora_id: int, victim: int | None) -> Resident:
        pause, longest = _POLL_SECONDS
        while True:
            replies = await self._call("loramix_commit", lora_id, victim)
            for reply in replies:
                if reply["state"] == "failed":
                    raise _error_of(reply)
            if all(reply["state"] == "done" for reply in replies):
                slowest = {phase: max(reply["seconds"][phase] for reply in replies) for phase in replies[0]["seconds"]}
                return Resident(recipe, lora_id, slowest, replies[0]["nbytes"])
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        replies: list[Any] = await self._client.collective_rpc(method, args=args)
        return replies


def _job(recipe: Recipe, lora_id: int) -> Job:
    sources = {source.name: source for source in recipe.sources}
    return Job(
        lora_id=lora_id,
        method=recipe.spec.method.name,
        options=dataclasses.asdict(recipe.spec.options),
        terms=[
            (term.adapter, term.plain_weight, str(sources[term.adapter].path), sources[term.adapter].digest)
            for term in recipe.spec.terms
        ],
    )


def _error_of(reply: dict[str, Any]) -> LoramixError:
    """What a worker reported as failed, as the error it was there."""
    match reply["kind"]:
        case "AdapterError":
            return AdapterError(reply["message"])
        case "RecipeError":
            return RecipeError(reply["message"], reply["param"])
    return LoramixError(f"the merge failed: {reply['message']}")
