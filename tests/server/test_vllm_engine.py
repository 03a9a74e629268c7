"""The engine over a stand-in for vLLM's client: ids, the table of requests, and what is cleaned up when a build fails."""

from types import SimpleNamespace
from typing import Any

import pytest

from merging import AdapterError, LoramixError
from server.catalog import Catalog, Recipe
from server.errors import ConfigError
from server.grammar import parse_expression

vllm_engine = pytest.importorskip("server.vllm_engine", reason="needs vLLM")
DONE = {"state": "done", "seconds": {"merge": 0.5}, "nbytes": 10}


class Client:
    """Answers collective_rpc for two workers; remembers the calls. `commits` are the replies to loramix_commit, in turn."""

    def __init__(self, commits: list[dict[str, Any]] | None = None) -> None:
        self.vllm_config = SimpleNamespace(lora_config=object())
        self.calls: list[tuple[str, Any]] = []
        self.commits = commits or []

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, args))
        if method == "loramix_commit":
            reply = self.commits.pop(0) if self.commits else DONE
            return [DONE, reply]
        return [None, None]


@pytest.fixture
def math(catalog: Catalog) -> Recipe:
    return catalog.resolve(parse_expression("math*0.5", "cat"))


@pytest.fixture
def code(catalog: Catalog) -> Recipe:
    return catalog.resolve(parse_expression("code", "cat"))


async def test_a_build_is_begun_then_committed_until_every_worker_has_it(math: Recipe) -> None:
    requests: dict[str, Any] = {}
    slow = {"state": "done", "seconds": {"merge": 2.0}, "nbytes": 10}
    client = Client([{"state": "pending"}, {"state": "pending"}, slow])
    resident = await vllm_engine.VllmEngine(client, requests).build(math, None)
    assert [method for method, _ in client.calls] == ["loramix_begin", *["loramix_commit"] * 3]
    assert client.calls[0][1][0]["terms"] == [("math", 0.5, str(math.sources[0].path), math.sources[0].digest)]
    assert resident.seconds == {"merge": 2.0}  # the slowest worker's
    assert requests[math.name].lora_int_id == resident.lora_id == 1


async def test_a_victim_is_off_the_table_before_it_leaves_its_slot(math: Recipe, code: Recipe) -> None:
    requests: dict[str, Any] = {}
    client = Client()
    engine = vllm_engine.VllmEngine(client, requests)
    first = await engine.build(math, None)
    second = await engine.build(code, first)
    assert list(requests) == [code.name]
    assert client.calls[-1] == ("loramix_commit", (second.lora_id, first.lora_id))


async def test_evicting_an_old_copy_leaves_the_new_one_on_the_table(math: Recipe) -> None:
    requests: dict[str, Any] = {}
    engine = vllm_engine.VllmEngine(Client(), requests)
    old, new = await engine.build(math, None), await engine.build(math, None)
    assert old.lora_id != new.lora_id
    await engine.evict(old)
    assert requests[math.name].lora_int_id == new.lora_id


async def test_a_failed_build_is_dropped_in_every_worker_and_raises_what_happened_there(math: Recipe) -> None:
    requests: dict[str, Any] = {}
    client = Client([{"state": "failed", "kind": "AdapterError", "message": "it changed", "param": None}])
    engine = vllm_engine.VllmEngine(client, requests)
    with pytest.raises(AdapterError, match="it changed"):
        await engine.build(math, None)
    assert client.calls[-1] == ("loramix_evict", (1,))
    assert requests == {}
    client.commits = [{"state": "failed", "kind": None, "message": "MemoryError: ", "param": None}]
    with pytest.raises(LoramixError, match="the merge failed: MemoryError"):
        await engine.build(math, None)


async def test_ids_stay_within_32_bits_and_skip_those_in_use(math: Recipe, code: Recipe) -> None:
    engine = vllm_engine.VllmEngine(Client(), {})
    first = await engine.build(math, None)
    engine._last_id = 2**31 - 2
    ids = [(await engine.build(code, None)).lora_id for _ in range(3)]
    assert first.lora_id == 1
    assert ids == [2**31 - 1, 2, 3]


async def test_a_server_without_lora_or_without_the_extension_says_what_to_start_it_with() -> None:
    client = Client()
    client.vllm_config.lora_config = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="--enable-lora"):
        await vllm_engine.VllmEngine(client, {}).setup(1)

    async def unknown(method: str, args: tuple[Any, ...]) -> list[Any]:
        raise Exception(f"Call to {method} failed")  # as vLLM does

    silent = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=object()), collective_rpc=unknown)
    with pytest.raises(ConfigError, match="--worker-extension-cls"):
        await vllm_engine.VllmEngine(silent, {}).setup(1)
