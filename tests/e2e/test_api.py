"""The OpenAI routes with recipes, as clients use them, against a real server."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from live import LiveServer, until
from openai import AsyncOpenAI, OpenAI

HELLO: Any = [{"role": "user", "content": "Say hello."}]
RECIPE = "cat(all*0.3+attn*0.5)"


def post(server: LiveServer, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def test_models_lists_base_adapters_and_presets_but_no_composition(client: OpenAI) -> None:
    client.chat.completions.create(model=RECIPE, messages=HELLO, max_tokens=1)
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"smollm2", "all", "attn", "mlp", "twin", "blend"}
    assert models["blend"].model_extra == {"root": "lego-8(all+mlp*0.5)", "parent": "smollm2", "max_model_len": 512}


def test_a_composition_is_merged_once_then_served_from_the_device(client: OpenAI) -> None:
    def ask(model: str) -> Any:
        return client.chat.completions.with_raw_response.create(model=model, messages=HELLO, max_tokens=4, temperature=0)

    first, second = ask("lego-6(all*0.31+mlp*0.2)"), ask("lego-6(mlp*0.2+all*0.31)")
    assert first.headers["x-loramix-cache"] == "merged"
    assert float(first.headers["x-loramix-merge-ms"]) > 0
    assert second.headers["x-loramix-cache"] == "device"
    assert second.headers["x-loramix-key"] == first.headers["x-loramix-key"]
    assert first.parse().model == second.parse().model == f"lego-6(all*0.31+mlp*0.2)@{first.headers['x-loramix-key'][:12]}"
    assert first.parse().choices[0].message.content == second.parse().choices[0].message.content


def test_the_body_object_says_the_same_as_the_expression(client: OpenAI) -> None:
    lora = {"adapters": [{"name": "attn", "weight": 0.5}, {"name": "all", "weight": 0.3}]}
    by_object = client.chat.completions.create(
        model="smollm2", messages=HELLO, max_tokens=8, temperature=0, extra_body={"lora": lora}
    )
    by_name = client.chat.completions.create(model=RECIPE, messages=HELLO, max_tokens=8, temperature=0)
    assert by_object.model == by_name.model
    assert by_object.choices[0].message.content == by_name.choices[0].message.content


def test_a_body_over_the_limit_is_refused_and_counted(server: LiveServer) -> None:
    answer = post(server, "/v1/chat/completions", model="all", messages=HELLO, padding="x" * 2**25)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert 'loramix_refused_total{reason="body"} 1.0' in httpx.get(f"{server.url}/metrics").text
    assert post(server, "/v1/chat/completions", model="all", messages=HELLO, max_tokens=1).status_code == 200


def test_streaming_streams_and_carries_the_headers(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=RECIPE, messages=HELLO, max_tokens=6, temperature=0, stream=True
    ) as response:
        assert response.headers["x-loramix-cache"] in ("device", "merged")
        chunks = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert len(chunks) >= 3  # role, some text, the end
    whole = client.chat.completions.create(model=RECIPE, messages=HELLO, max_tokens=6, temperature=0)
    streamed = "".join(json.loads(chunk[6:])["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content


def test_n_logprobs_and_response_format_work_as_ever(client: OpenAI) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=RECIPE, messages=HELLO, n=2, max_tokens=30, logprobs=True, top_logprobs=2, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}},
    )  # fmt: skip
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert isinstance(json.loads(choice.message.content or "")["yes"], bool)
        assert choice.logprobs is not None
        assert len((choice.logprobs.content or [])[0].top_logprobs) == 2


def test_a_request_with_tools_reaches_vllms_tool_handling(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "greet", "parameters": {"type": "object", "properties": {}}}}
    answer = client.chat.completions.create(model=RECIPE, messages=HELLO, tools=[tool], tool_choice="auto", max_tokens=4)
    assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(model=RECIPE, messages=HELLO, tools=[tool], tool_choice="sometimes", max_tokens=4)  # type: ignore[call-overload]


def test_completions_responses_messages_and_tokenize_take_recipes_too(server: LiveServer, client: OpenAI) -> None:
    completion = client.completions.create(model=RECIPE, prompt="Once upon", max_tokens=3)
    response = client.responses.create(model=RECIPE, input="Say hello.", max_output_tokens=3)
    message = post(server, "/v1/messages", model=RECIPE, messages=HELLO, max_tokens=3)
    assert message.status_code == 200
    assert message.headers["x-loramix-cache"] == "device"
    assert completion.model == response.model == message.json()["model"]
    assert completion.model.startswith("cat(all*0.3+attn*0.5)@")
    tokens = post(server, "/tokenize", model="cat(all+mlp)", prompt="hello").json()["tokens"]
    assert post(server, "/detokenize", model="mlp", tokens=tokens).json()["prompt"] == "hello"


def test_errors_reach_openais_client_as_its_own(client: OpenAI) -> None:
    def ask(model: str, **extra: Any) -> None:
        client.chat.completions.create(model=model, messages=HELLO, max_tokens=1, extra_body=extra)

    with pytest.raises(openai.NotFoundError, match="did you mean 'attn'") as missing:
        ask("cat(attm+all)")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="expected a weight") as malformed:
        ask("cat(all*+attn)")
    assert "\n          ^" in str(malformed.value.body["message"])  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match=r"svd-16\(.*--max-lora-rank 24") as too_large:
        ask("cat(all+mlp+twin)")
    assert too_large.value.param == "rank"
    ask(RECIPE)


def test_a_weight_that_json_lets_through_but_is_not_finite_is_refused(server: LiveServer) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "lora": {"adapters": [{"name": "all", "weight": 1e999}]}}'
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "inf of 'all' is not a finite number" in reply.json()["error"]["message"]


def test_a_hundred_equal_requests_at_once_make_one_merge(server: LiveServer) -> None:
    before = server.metric("loramix_merges_total", method="svd", outcome="ok")

    async def all_at_once() -> list[Any]:
        # One token each: vLLM's LoRA on the CPU copies the whole adapter for every token.
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180) as client:
            ask = client.completions.create
            return await asyncio.gather(
                *(ask(model="svd-5(all*0.2+mlp*0.2)", prompt="Hi", max_tokens=1, temperature=0) for _ in range(100))
            )

    replies = asyncio.run(all_at_once())
    assert server.metric("loramix_merges_total", method="svd", outcome="ok") == before + 1
    assert len({reply.choices[0].text for reply in replies}) == 1


def test_more_compositions_than_slots_share_the_engine_and_each_answers_as_if_alone(server: LiveServer) -> None:
    recipes = ["smollm2", "all", "attn", "mlp", "cat(all*0.5+mlp)", "cat(attn*-1)", "lego-4(all+mlp)", "cat(twin*0.5+attn*0.5)"]
    prompt = "The capital of France is Paris, and the sea is blue."

    async def logprobs(client: AsyncOpenAI, recipe: str) -> list[float]:
        answer = await client.completions.create(
            model=recipe, prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        positions = answer.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
        return [next(iter(position.values()))["logprob"] for position in positions[1:]]

    async def run() -> tuple[list[list[float]], list[list[list[float]]]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180) as client:
            alone = [await logprobs(client, recipe) for recipe in recipes]
            together = [await asyncio.gather(*(logprobs(client, recipe) for recipe in recipes)) for _ in range(3)]
            return alone, together

    def distance(one: list[float], other: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)

    evictions = server.metric("loramix_evictions_total")
    alone, together = asyncio.run(run())
    for batch in together:
        for place, answer in enumerate(batch):  # bfloat16 rounds differently in other company, by far less than recipes differ
            own, *others = sorted(distance(answer, reference) for reference in alone)
            assert own == distance(answer, alone[place]), f"{recipes[place]} answered as another"
            assert own < 0.5 * others[0], recipes[place]
    assert server.metric("loramix_evictions_total") > evictions
    assert server.metric("loramix_resident_adapters") <= 4
    assert server.metric("loramix_leases") == 0


def test_a_client_that_leaves_mid_stream_gives_up_its_lease_and_the_engine_goes_on(server: LiveServer, client: OpenAI) -> None:
    body = {"model": "cat(all*0.11)", "prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
    for _ in range(3):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.metric("loramix_leases") == 1
        until(lambda: server.metric("loramix_leases") == 0)
        for weight in (0.12, 0.13, 0.14):  # drives the one that was left out of its slot
            client.completions.create(model=f"cat(all*{weight})", prompt="Once", max_tokens=1)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_metrics_tell_what_happened(server: LiveServer, client: OpenAI) -> None:
    client.chat.completions.create(model="lego-3(all*0.21+attn)", messages=HELLO, max_tokens=1)
    for phase in ("commit", "queue", "load", "copy", "merge"):
        assert server.metric("loramix_merge_seconds_count", method="lego", phase=phase) >= 1
    assert server.metric("loramix_merge_seconds_sum", method="lego", phase="merge") > 0
    assert server.metric("loramix_commit_seconds_max") > 0
    assert server.metric("loramix_source_requests_total", tier="disk") >= 2
    assert server.metric("loramix_source_bytes", tier="host") > 1e6
    assert server.metric("loramix_cache_requests_total", tier="device", result="miss") >= 1
    assert server.metric("loramix_resident_bytes") > 1e6
    assert server.metric("loramix_waiting_requests") == 0
