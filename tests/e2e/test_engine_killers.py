"""What ends engines elsewhere, tried on a real server beside clients who must notice nothing: the engine lives, and whoever is
to blame gets a clear error.

Few slots, and memory for two source adapters, so that adapters are evicted and read again all the time.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, until
from tiny import save_tiny_adapter, tiny_server

SLOTS = 3
PATIENCE = 3  # seconds that a request waits for a slot
BYSTANDERS = ["smollm2", "cat(a0*0.5+a1)", "a2"]
OTHERS = ["a3", "a4", "a5", "cat(a3+a4)"]
IMPOSSIBLE: list[dict[str, Any]] = [
    {"prompt": [49152]}, {"prompt": [-1]}, {"prompt": [2**70]}, {"prompt": ""}, {"prompt": [[]]}, {"prompt": "x " * 5000},
    {"logit_bias": {"49152": 1}}, {"logit_bias": {"-1": 1}}, {"allowed_token_ids": []}, {"allowed_token_ids": [-3]},
    {"stop_token_ids": [2**70]}, {"n": 0}, {"n": 10**5}, {"max_tokens": 0}, {"max_tokens": 2**63}, {"logprobs": 10**6},
    {"prompt_logprobs": -5}, {"temperature": -1}, {"temperature": 1e308}, {"top_k": -5}, {"top_p": 0}, {"min_tokens": 9},
    {"seed": 2**64}, {"priority": 2**70}, {"bad_words": [""]}, {"stop": ""}, {"cache_salt": ""}, {"repetition_penalty": 0},
    {"structured_outputs": {"regex": "("}}, {"structured_outputs": {"grammar": "@@@"}}, {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": {"type": "nonsense"}}}, {"prompt_embeds": "AAAA"}, {"truncate_prompt_tokens": -5},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for seed in range(6):
        save_tiny_adapter(root / f"a{seed}", seed, rank=4)
    for seed, name in enumerate(("gone", "cut", "other")):
        save_tiny_adapter(root / name, 10 + seed, rank=4)
    save_tiny_adapter(root / "largest", 20, rank=1, size=600)  # all but refused at the start
    return root


@pytest.fixture(scope="module")
def attacked(tiny: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    two = 2.5 * (folders / "a0" / "adapter_model.safetensors").stat().st_size / 2**30
    options = ["--merge-timeout", str(PATIENCE), "--adapter-host-gib", f"{two:.6f}"]
    log = tmp_path_factory.mktemp("attacked") / "log"
    with tiny_server(
        tiny, folders, log, *options, slots=SLOTS, environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    ) as server:
        yield server


def ask(server: LiveServer, model: str, **body: Any) -> httpx.Response:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def stream_of(server: LiveServer, model: str) -> AbstractContextManager[httpx.Response]:
    body = {"model": model, "prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    return httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60)


def text_of(reply: httpx.Response) -> str:
    return str(reply.raise_for_status().json()["choices"][0]["text"])


def error_of(reply: httpx.Response) -> tuple[int, str]:
    error = reply.json()["error"]
    assert error["code"] == reply.status_code
    return reply.status_code, error["message"]


@pytest.fixture(scope="module")
def right(attacked: LiveServer) -> dict[str, str]:
    """What each bystander gets when nobody is there."""
    return {model: text_of(ask(attacked, model)) for model in BYSTANDERS}


@pytest.fixture(autouse=True)
def _nobody_else_notices(attacked: LiveServer, right: dict[str, str]) -> Iterator[None]:
    """Bystanders ask all the time, and afterwards; what they get is what they got alone, however late for want of slots."""
    over = False

    def insist(model: str) -> int:
        answered = 0
        while not over:
            reply = ask(attacked, model)
            if reply.status_code != 503:  # every slot was held by streams
                assert text_of(reply) == right[model], model
                answered += 1
        return answered

    with ThreadPoolExecutor() as clients:
        insisting = [clients.submit(insist, model) for model in BYSTANDERS]
        yield
        over = True
    assert sum(each.result() for each in insisting) > 0
    for model in BYSTANDERS:
        assert text_of(ask(attacked, model)) == right[model]
    assert httpx.get(f"{attacked.url}/health").status_code == 200
    until(attacked.is_idle)


def evict(server: LiveServer) -> None:
    """Drive whatever nobody uses out of its slot, and out of memory."""
    for model in OTHERS:
        text_of(ask(server, model))


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_an_evicted_adapter_whose_folder_is_no_longer_what_it_was(
    attacked: LiveServer, folders: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(folders / damage, tmp_path / "kept")
    before = text_of(ask(attacked, f"cat({damage}*0.5)"))
    evict(attacked)
    shutil.rmtree(folders / damage)
    if damage == "cut":
        shutil.copytree(tmp_path / "kept", folders / damage)
        weights = folders / damage / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "other":
        shutil.copytree(folders / "a5", folders / damage)
    for model in (f"cat({damage}*0.5)", damage, f"svd-4({damage}+a3)"):
        status, message = error_of(ask(attacked, model))
        assert status == 400
        assert damage in message
    shutil.rmtree(folders / damage, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folders / damage)
    assert text_of(ask(attacked, f"cat({damage}*0.5)")) == before


def test_a_request_that_the_engine_still_runs_when_its_client_its_slot_and_its_adapters_folder_are_gone(
    attacked: LiveServer, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "gone", tmp_path / "kept")
    for number in range(10):
        with stream_of(attacked, f"cat(gone*0.{number + 1}1)") as reply:
            assert reply.status_code == 200
            next(reply.iter_lines())
            shutil.rmtree(folders / "gone")
        evict(attacked)
        shutil.copytree(tmp_path / "kept", folders / "gone")


def test_a_composition_more_than_there_are_slots(attacked: LiveServer) -> None:
    with ExitStack() as stack:
        streams = []
        for number in range(SLOTS):
            body = {
                "model": f"cat(a3*0.{number + 1}3)",
                "prompt": "Once",
                "max_tokens": 500,
                "ignore_eos": True,
                "stream": True,
            }
            url = f"{attacked.url}/v1/completions"
            streams.append(stack.enter_context(httpx.stream("POST", url, json=body, timeout=60)))
            assert streams[-1].status_code == 200
        refused = [ask(attacked, "cat(a4*0.44)") for _ in range(2)]
        for stream in streams:
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
    assert text_of(ask(attacked, "cat(a4*0.44)"))
    assert {reply.status_code for reply in refused} <= {200, 503}
    for reply in refused:
        if reply.status_code == 503:
            assert "was not ready within 3 s" in error_of(reply)[1]
            assert int(reply.headers["retry-after"]) > 0


def test_loading_and_unloading_past_loramix(attacked: LiveServer, folders: Path) -> None:
    for path in ("/nowhere", str(folders / "a0"), "../../../etc"):
        for route, body in {
            "/v1/load_lora_adapter": {"lora_name": "a0", "lora_path": path},
            "/v1/unload_lora_adapter": {"lora_name": "a2"},
            "/adapters": {"name": "a0", "src": path},
        }.items():
            assert error_of(httpx.post(f"{attacked.url}{route}", json=body, timeout=60))[0] == 403


def test_the_engines_own_names_of_what_is_resident_was_or_never_was(attacked: LiveServer) -> None:
    resident = ask(attacked, "cat(a3*0.77)").json()["model"]
    for _ in range(2):
        for name in (
            resident,
            f"cat(a3*0.77)@{'0' * 12}",
            "a3@",
            "loramix/a3",
            "/etc/passwd",
            "../a3",
            "a3\x00",
            "cat(a3*0.77)@",
        ):
            status, message = error_of(ask(attacked, name))
            assert status in (400, 404)
            assert message
        evict(attacked)
    for route in ("/v1/embeddings", "/v1/chat/completions/render", "/inference/v1/generate", "/pooling", "/v1/score"):
        reply = httpx.post(f"{attacked.url}{route}", json={"model": resident, "input": "x", "token_ids": [1]}, timeout=60)
        assert 400 <= reply.status_code < 500


def test_log_probabilities_of_the_prompts_of_many_compositions_in_one_batch(attacked: LiveServer) -> None:
    with ThreadPoolExecutor() as clients:
        replies = list(clients.map(lambda model: ask(attacked, model, prompt_logprobs=1), [*BYSTANDERS, "a3"] * 4))
    assert {reply.status_code for reply in replies} == {200}


def test_the_largest_entries_and_weights_that_are_let_through_give_numbers_and_spoil_nobodys(attacked: LiveServer) -> None:
    for model in (
        "largest",
        "cat(largest*10000)",
        "cat(largest*-10000+a0*10000)",
        "svd-1(largest*10000+a3)",
        "lego-1(largest*1e4+a3)",
    ):
        reply = ask(attacked, model, logprobs=1)  # NaN could not be sent
        assert reply.status_code == 200, reply.text
    assert "10000 at most" in error_of(ask(attacked, "cat(largest*10001)"))[1]


def test_fields_of_vllms_that_cannot_be(attacked: LiveServer) -> None:
    for body in IMPOSSIBLE:
        status, message = error_of(ask(attacked, "cat(a3*0.5)", **body))
        assert (status, bool(message)) == (400, True), body
