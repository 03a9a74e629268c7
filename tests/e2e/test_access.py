"""Keys as operators set them and clients send them, against a real server."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import LiveServer, refused, serve_command
from openai import OpenAI

HELLO: Any = [{"role": "user", "content": "Say hello."}]
ALL, LIMITED, BOSS = "sk-0123456789-all", "sk-0123456789-limited", "sk-0123456789-boss"


@pytest.fixture(scope="module")
def guarded(model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys.toml"
    keys.write_text(
        f'[[key]]\nname = "everything"\nsha256 = "{hashlib.sha256(ALL.encode()).hexdigest()}"\n'
        f'[[key]]\nname = "limited"\nkey = "{LIMITED}"\nadapters = ["at*", "mlp"]\n'
    )
    keys.chmod(0o600)
    options = [
        "--adapters", str(adapters), "--preset", "seen=attn+mlp*0.5", "--preset", "unseen=lego-8(all+mlp)", "--max-loras", "3",
        "--max-lora-rank", "16", "--keys-file", str(keys),
    ]  # fmt: skip
    environment = {"LORAMIX_ADMIN_KEY": BOSS, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with LiveServer(serve_command(model, *options), folder / "log", environment) as live:
        yield live


def client_of(server: LiveServer, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_openais_client_works_with_a_key_and_is_told_what_is_wrong_without(guarded: LiveServer) -> None:
    with client_of(guarded, ALL) as client:
        answer = client.chat.completions.create(model="cat(all*0.3+attn*0.5)", messages=HELLO, max_tokens=2)
        assert answer.model.startswith("cat(all*0.3+attn*0.5)@")
    with client_of(guarded, "none") as client, pytest.raises(openai.AuthenticationError, match="does not know the key"):
        client.chat.completions.create(model="all", messages=HELLO)
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    assert httpx.get(f"{guarded.url}/metrics").status_code == 401
    assert httpx.get(f"{guarded.url}/metrics", headers={"x-api-key": ALL}).status_code == 200
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    body = {"model": "attn", "messages": HELLO, "max_tokens": 2}
    message = httpx.post(f"{guarded.url}/v1/messages", json=body, headers={"x-api-key": LIMITED}, timeout=120)
    assert message.status_code == 200


def test_a_limited_key_sees_and_uses_its_own_adapters_alone(guarded: LiveServer) -> None:
    with client_of(guarded, ALL) as client:
        assert [card.id for card in client.models.list()] == ["smollm2", "all", "attn", "mlp", "twin", "seen", "unseen"]
        resident = client.completions.create(model="all", prompt="Once", max_tokens=1).model
    with client_of(guarded, LIMITED) as client:
        assert [card.id for card in client.models.list()] == ["smollm2", "attn", "mlp", "seen"]
        for model in ("smollm2", "attn", "cat(attn+mlp*0.5)", "seen"):
            client.completions.create(model=model, prompt="Once", max_tokens=1)
        for model in ("all", "cat(attn+all)", "unseen"):
            with pytest.raises(openai.NotFoundError) as missing:
                client.completions.create(model=model, prompt="Once", max_tokens=1)
            assert "twin" not in str(missing.value)
        body = {"model": resident, "token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1}}
        reply = httpx.post(f"{guarded.url}/inference/v1/generate", json=body, headers={"x-api-key": LIMITED})
        assert reply.status_code == 403


def test_nobody_loads_adapters_past_loramix_and_admin_routes_want_an_admin_key(guarded: LiveServer, adapters: Path) -> None:
    body = {"lora_name": "more", "lora_path": str(adapters / "all")}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
        assert httpx.post(f"{guarded.url}{path}", json=body, headers={"x-api-key": BOSS}).status_code == 403
    for key, status in ((ALL, 403), (LIMITED, 403), (BOSS, 200)):
        assert httpx.get(f"{guarded.url}/openapi.json", headers={"x-api-key": key}).status_code == status


def test_what_the_server_says_shows_no_key(guarded: LiveServer) -> None:
    log = guarded.log.read_text()
    assert not [key for key in (ALL, LIMITED, BOSS, hashlib.sha256(ALL.encode()).hexdigest()) if key in log]


def test_bad_keys_stop_the_start_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text('[[key]]\nname = "a"\nkey = "tooshort"\n')
    for arguments in (["--keys-file", str(tmp_path / "keys.toml")], []):
        said = refused("serve", model, *arguments, LORAMIX_KEYS_FILE=str(tmp_path / "keys.toml"))
        assert "key 1 (a): a key has at least 16 characters" in said
        assert "tooshort" not in said
