"""What the benchmark asks of a server: requests, the scripts that clients play, and seeded recipes to put in them."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Request:
    """One POST; `label` tells its answer apart, `pause` is how many seconds its client waits after it."""

    path: str
    body: dict[str, Any]
    label: str = ""
    pause: float = 0.0


@dataclass(frozen=True)
class Script:
    """What one client does: its requests one after another, from `start` seconds on; over and over with `repeat`."""

    requests: tuple[Request, ...]
    start: float = 0.0
    repeat: bool = False


class Prompts:
    """Token ids drawn at random, so that no two prompts share a prefix that a cache could hold."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._range = range(min(1000, vocabulary // 2), vocabulary - 500)
        self._length = length

    def completion(self, model: str, tokens: int, label: str = "", pause: float = 0.0) -> Request:
        """A streamed completion of exactly `tokens` tokens by `model`."""
        body = {
            "model": model, "prompt": self._random.choices(self._range, k=self._length), "max_tokens": tokens,
            "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        return Request(COMPLETIONS, body, label, pause)

    def streams(self, models: Sequence[str], count: int, tokens: int) -> list[Script]:
        """`count` clients, the models dealt out among them, each asking for `tokens` tokens over and over."""
        return [Script((self.completion(models[i % len(models)], tokens),), repeat=True) for i in range(count)]


def compositions(
    names: Sequence[str], terms: int, method: str, seed: int, *, in_turn: bool = False
) -> Iterator[dict[str, float]]:
    """Weighted adapters, endlessly, no two alike: new to any server.

    Args:
        in_turn: take the next adapters of a cycle through all names (so that a cache smaller than all of them, which keeps
            what was used last, never holds the next ones), rather than some at random.
    """
    draw = random.Random(f"{method} {seed}")
    cycle = itertools.cycle(names)
    seen = set()
    while True:
        chosen = list(itertools.islice(cycle, terms)) if in_turn else draw.sample(list(names), terms)
        weights = {name: round(draw.uniform(0.2, 1.5), 3) for name in chosen}
        if (meaning := frozenset(weights.items())) not in seen:
            seen.add(meaning)
            yield weights


def recipe(method: str, weights: dict[str, float]) -> str:
    """`lego-16(a*0.7+b*0.3)`."""
    return f"{method}({'+'.join(f'{name}*{weight}' for name, weight in weights.items())})"


def recipes(names: Sequence[str], terms: int, method: str, seed: int, count: int, *, in_turn: bool = False) -> list[str]:
    """The first `count` recipes of `compositions`."""
    drawn = compositions(names, terms, method, seed, in_turn=in_turn)
    return [recipe(method, weights) for weights in itertools.islice(drawn, count)]


def zipf(population: Sequence[str], exponent: float, seed: int) -> Iterator[str]:
    """Endless draws: the k-th of the population with a probability that is proportional to k^−exponent."""
    weights = [k**-exponent for k in range(1, len(population) + 1)]
    draw = random.Random(seed)
    while True:
        yield from draw.choices(population, weights, k=1000)
