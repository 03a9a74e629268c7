"""Adapters, merged adapters and presets changed on a real server: what it serves is what was said last, caches included."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live import LiveServer, serve_command
from logprobs import EXACT, TEXT, distance, logprobs_of, served_logprobs, with_dense_deltas
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer, PreTrainedModel

from merging import LoraAdapter, LoraModule, load_adapter, save_adapter

BOSS, USER = "sk-0123456789-boss", "sk-0123456789-user"


class Admin(httpx.Client):
    """A client with the admin key."""

    def __init__(self, server: LiveServer) -> None:
        super().__init__(base_url=server.url, headers={"x-api-key": BOSS}, timeout=120)

    def ask(self, model: str, **more: Any) -> httpx.Response:
        return self.post("/v1/completions", json={"model": model, "prompt": "Once", "max_tokens": 1, **more})

    def cache(self) -> dict[str, Any]:
        """By recipe."""
        return {entry["name"].partition("@")[0]: entry for entry in self.get("/v1/lora/cache").json()["data"]}

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics").text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.fixture(scope="module")
def root(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`given` has what the command line gives; `more` is an allowed root, in which `one` and `two` are two versions."""
    root = tmp_path_factory.mktemp("admin")
    shutil.copytree(adapters / "all", root / "given" / "all")
    for seed, name in enumerate(("one", "two")):
        generator, modules = torch.Generator().manual_seed(50 + seed), {}
        for module, like in load_adapter(adapters / "mlp").modules.items():
            d_out, d_in = like.shape
            a, b = torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator)
            modules[module] = LoraModule((a / d_in**0.5).bfloat16(), (b * 0.25).bfloat16())
        save_adapter(LoraAdapter(modules), root / "more" / name)
    return root


@pytest.fixture(scope="module")
def start(model: Path, root: Path) -> Callable[[str], LiveServer]:
    options = [
        "--adapters", str(root / "given"), "--adapter-root", str(root / "more"), "--state-dir", str(root / "state"),
        "--max-loras", "4", "--max-lora-rank", "16", "--dtype", "float32", "--enable-prefix-caching",
    ]  # fmt: skip
    keys = {"LORAMIX_ADMIN_KEY": BOSS, "LORAMIX_API_KEY": USER}
    return lambda log: LiveServer(serve_command(model, *options), root / log, keys)


@pytest.fixture(scope="module")
def live(start: Callable[[str], LiveServer]) -> Iterator[LiveServer]:
    with start("log") as live:
        yield live


@pytest.fixture(scope="module")
def admin(live: LiveServer) -> Iterator[Admin]:
    with Admin(live) as admin:
        yield admin


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]  # type: ignore[no-any-return]


def put(root: Path, version: str) -> None:
    """Have that version lie in the folder `swap`, as a copy of the same times and sizes would."""
    shutil.rmtree(root / "more" / "swap", ignore_errors=True)
    shutil.copytree(root / "more" / version, root / "more" / "swap")


def next_token(admin: Admin, recipe: str, tokens: list[int]) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens; vLLM reads its prefix cache for these, and not for those of a prompt."""
    reply = admin.ask(recipe, prompt=tokens, logprobs=5, temperature=0, return_tokens_as_token_ids=True)
    top = reply.raise_for_status().json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): value for token, value in top.items()}


def off_by(served: dict[int, float], network: PreTrainedModel, tokens: list[int]) -> float:
    with torch.inference_mode():
        right = network(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    return sum(abs(value - right[token].item()) for token, value in served.items()) / len(served)


def test_replaced_weights_answer_from_the_next_request_on_and_so_do_those_put_back(
    live: LiveServer, admin: Admin, model: Path, root: Path, tokens: list[int]
) -> None:
    tokens = tokens * 6  # the prefix cache keeps whole blocks alone, of 128 tokens on the CPU
    networks = {version: with_dense_deltas(model, root / "more", {version: 1.0}) for version in ("one", "two")}
    digests = []
    for round_, version in enumerate(("one", "two", "one")):
        put(root, version)
        reply = admin.post("/v1/lora/adapters", json={"name": "swap", "path": "swap"}).raise_for_status()
        digests.append(reply.json()["digest"])
        assert reply.json()["outcome"] == ("replaced" if round_ else "added")
        other = networks["two" if version == "one" else "one"]
        first = next_token(admin, "swap", tokens)
        hits = admin.metric("vllm:prefix_cache_hits_total")
        again = next_token(admin, "swap", tokens)
        assert admin.metric("vllm:prefix_cache_hits_total") > hits  # that cache was at work
        for served in (first, again):
            assert off_by(served, networks[version], tokens) < 10 * EXACT
            assert off_by(served, other, tokens) > 1000 * EXACT
        served_whole = served_logprobs(live, "swap", tokens, BOSS)
        assert distance(served_whole, logprobs_of(networks[version], tokens)) < EXACT
        assert distance(served_whole, logprobs_of(other, tokens)) > 1000 * EXACT
    assert digests[0] == digests[2] != digests[1]
    assert admin.delete("/v1/lora/adapters/swap").status_code == 204


def test_a_deletion_waits_for_the_stream_that_uses_it_and_frees_what_it_took(
    live: LiveServer, admin: Admin, root: Path
) -> None:
    put(root, "one")
    admin.ask("all").raise_for_status()
    before = admin.metric("loramix_source_bytes")
    assert admin.post("/v1/lora/adapters", json={"name": "swap", "path": "swap"}).status_code == 201
    lines: list[str] = []

    def stream() -> None:
        body = {"model": "swap", "prompt": "Once", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, headers={"x-api-key": USER}, timeout=120) as reply:
            lines.extend(line for line in reply.iter_lines() if line.startswith("data:"))

    streaming = threading.Thread(target=stream)
    streaming.start()
    while not lines:
        time.sleep(0.02)
    assert admin.metric("loramix_source_bytes") > before
    deleted: list[int] = []
    deleting = threading.Thread(target=lambda: deleted.append(admin.delete("/v1/lora/adapters/swap").status_code))
    deleting.start()
    while admin.ask("swap").status_code != 404:
        time.sleep(0.02)
    assert streaming.is_alive()
    assert deleted == []
    assert admin.cache()["swap"]["leases"] == 1
    streaming.join()
    deleting.join()
    assert deleted == [204]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 100
    assert "swap" not in admin.cache()
    assert admin.metric("loramix_source_bytes") == before
    assert admin.ask("all").status_code == 200


def test_a_client_that_does_not_wait_for_its_deletion_changes_nothing_about_it(
    live: LiveServer, admin: Admin, root: Path
) -> None:
    put(root, "one")
    admin.post("/v1/lora/adapters", json={"name": "swap", "path": "swap"}).raise_for_status()
    with httpx.stream(
        "POST", f"{live.url}/v1/completions", headers={"x-api-key": USER}, timeout=120,
        json={"model": "swap", "prompt": "Once", "max_tokens": 60, "stream": True, "ignore_eos": True},
    ) as reply:  # fmt: skip
        lines = reply.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            admin.delete("/v1/lora/adapters/swap", timeout=0.3)
        assert admin.ask("swap").status_code == 404
        assert list(lines)[-2] == "data: [DONE]"
    deadline = time.monotonic() + 20
    while "swap" in admin.cache():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_pinned_outlives_any_number_of_other_compositions(admin: Admin) -> None:
    warmed = admin.post("/v1/lora/warm", json={"recipe": "cat(all*0.123)", "pin": True}).raise_for_status().json()
    assert (warmed["tier"], warmed["pinned"]) == ("merged", True)
    evictions = admin.metric("loramix_evictions_total")
    for number in range(1, 8):
        admin.ask(f"cat(all*0.0{number})").raise_for_status()
    assert admin.metric("loramix_evictions_total") > evictions
    assert admin.ask("cat(all*0.123)").headers["x-loramix-cache"] == "device"
    assert admin.delete(f"/v1/lora/cache/{warmed['key']}").status_code == 204
    assert admin.ask("cat(all*0.123)").headers["x-loramix-cache"] == "merged"


def test_only_an_admin_changes_anything_and_reads_how(live: LiveServer, admin: Admin) -> None:
    for method, path in (("GET", "adapters"), ("POST", "presets"), ("DELETE", "adapters/all"), ("POST", "warm")):
        for key, status in ((USER, 403), ("sk-0123456789-nobody", 401)):
            assert httpx.request(method, f"{live.url}/v1/lora/{path}", headers={"x-api-key": key}).status_code == status
    paths = admin.get("/openapi.json").json()["paths"]
    assert {"/v1/lora/adapters", "/v1/lora/cache/{key}", "/v1/lora/warm", "/v1/lora/presets/{name}"} <= set(paths)
    reply = admin.post("/v1/lora/adapters", content=b"{", headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "BadRequestError")
    assert admin.post("/v1/lora/adapters", json={"name": "x", "path": "/etc"}).status_code == 403


def test_adapters_and_presets_outlive_the_server(
    live: LiveServer, admin: Admin, root: Path, start: Callable[[str], LiveServer], tokens: list[int]
) -> None:
    """The last one: it stops the server."""
    put(root, "two")
    for path, body in (
        ("adapters", {"name": "swap", "path": "swap"}), ("presets", {"name": "tutor", "recipe": "cat(all*0.3+swap*0.5)"}),
        ("presets", {"name": "gone", "recipe": "all"}),
    ):  # fmt: skip
        assert admin.post(f"/v1/lora/{path}", json=body).status_code == 201
    assert admin.delete("/v1/lora/presets/gone").status_code == 204
    names = [card["id"] for card in admin.get("/v1/models").json()["data"]]
    assert names == ["smollm2", "all", "swap", "tutor"]
    served = served_logprobs(live, "tutor", tokens, BOSS)
    assert live.stop() == 0
    assert json.loads((root / "state" / "presets" / "tutor.json").read_text())["recipe"]["method"] == "cat"
    with start("log-again") as again, Admin(again) as after:
        assert [card["id"] for card in after.get("/v1/models").json()["data"]] == names
        assert distance(served_logprobs(again, "tutor", tokens, BOSS), served) < EXACT
        assert again.stop() == 0
