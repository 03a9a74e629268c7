"""Many clients that ask a server for many compositions at once, and the answer that each composition gives by itself."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from logprobs import base

from merging import LoraAdapter, load_adapter, merge
from server.grammar import parse_expression

METHODS = "cat lego-6 svd-6 linear ties-0.5 magnitude-0.5 dare-0.5 core-ties-0.5 tsv iso".split()
PROMPT = list(range(1000, 1040))
TOKENS = 4
# Seen between vLLM and transformers in float32: 2e-5. Compositions that are closer than ten times NEAR are not told apart.
NEAR = 1e-3


@dataclass(frozen=True)
class Composition:
    """What a recipe answers to PROMPT: its likeliest tokens, and the log-probability of the first."""

    recipe: str
    tokens: tuple[int, ...]
    logprob: float

    def is_answered_by(self, choice: dict[str, Any]) -> bool:
        logprob = choice["logprobs"]["token_logprobs"][0]
        return tuple(choice["token_ids"]) == self.tokens and abs(logprob - self.logprob) < NEAR


class _Reference:
    """The base model, to whose weights ΔW is added and taken away again."""

    def __init__(self, model: Path, adapters: Path) -> None:
        self._network = base(model)
        self._adapters = {folder.name: load_adapter(folder) for folder in sorted(adapters.iterdir())}
        self._kept = {name: weight.clone() for name, weight in self._network.state_dict().items()}

    def drawn(self, random_: random.Random) -> str:
        method, count = random_.choice(METHODS), random_.randint(2, 4)
        # The elementwise methods take equal ranks only.
        names = random_.sample([name for name, each in self._adapters.items() if each.rank == 4], count)
        return f"{method}({'+'.join(f'{name}*{random_.uniform(0.3, 1.3):.2f}' for name in names)})"

    def answer(self, recipe: str) -> Composition | None:
        """None where a token is about as likely as another, so that rounding could choose."""
        spec = parse_expression(recipe, "cat")
        self._add(merge({term.adapter: self._adapters[term.adapter] for term in spec.terms}, spec, dtype=torch.float32))
        tokens: list[int] = []
        first = 0.0
        with torch.inference_mode():
            for _ in range(TOKENS):
                logits = self._network(torch.tensor([PROMPT + tokens]), logits_to_keep=1).logits[0, -1]
                (best, second), (token, _) = (values.tolist() for values in logits.log_softmax(-1).topk(2))
                if best - second < 10 * NEAR:
                    return None
                first = first if tokens else best
                tokens.append(token)
        return Composition(recipe, tuple(tokens), first)

    def _add(self, adapter: LoraAdapter) -> None:
        self._network.load_state_dict(self._kept)
        for name, module in adapter.modules.items():
            weight = self._network.get_submodule(name).weight
            weight.data = (weight.data.double() + module.delta()).float()


def compositions(model: Path, adapters: Path, count: int, seed: int = 0) -> list[Composition]:
    """Random ones, no two of which could be taken for each other."""
    random_, reference = random.Random(seed), _Reference(model, adapters)
    chosen: list[Composition] = []
    while len(chosen) < count:
        new = reference.answer(reference.drawn(random_))
        alike = new is None or any(new.tokens == old.tokens and abs(new.logprob - old.logprob) < 10 * NEAR for old in chosen)
        if new is not None and not alike:
            chosen.append(new)
    return chosen


async def churn(
    url: str,
    chosen: list[Composition],
    requests: int,
    clients: int = 16,
    leaving: float = 0.03,
    seen: Callable[[int], None] = lambda count: None,
) -> Counter[str]:
    """Have `clients` at a time ask for random compositions; a part of them hangs up at a random moment.

    Returns how many requests were answered `right`, `left`, or anything else by what came instead. `seen` is told how many have
    ended, after each.
    """
    random_, ended = random.Random(1), Counter[str]()
    numbers = iter(range(requests))

    async def ask(client: httpx.AsyncClient, composition: Composition, patience: float | None) -> str:
        body = {"model": composition.recipe, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0}
        try:
            async with asyncio.timeout(patience):
                reply = await client.post("/v1/completions", json={**body, "return_token_ids": True, "ignore_eos": True})
        except TimeoutError:
            return "left"
        if reply.status_code != 200:
            return f"{reply.status_code} {reply.text}"
        choice = reply.json()["choices"][0]
        whose = [each.recipe for each in chosen if each.is_answered_by(choice)]
        return "right" if whose == [composition.recipe] else f"{composition} got the answer of {whose or 'none'}: {choice}"

    async def one_client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            for _ in numbers:
                patience = random_.uniform(0, 0.3) if random_.random() < leaving else None
                ended[await ask(client, random_.choice(chosen), patience)] += 1
                seen(ended.total())

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return ended
