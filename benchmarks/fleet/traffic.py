"""Who asks for what, and when: compositions of adapters by power laws, with new ones coming and one that all want at once.

Everything is drawn with numpy from a seed. A composition is a number; its adapters are a row of numbers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Population:
    """What there is to ask for.

    Attributes:
        adapters: how many. compositions: how many distinct ones.
        terms: adapters in each, all different.
        adapter_exponent: of the power law by which compositions choose adapters.
        weightings: compositions that share their adapters and differ in weights alone.
        exponent: of the power law by which requests choose compositions.
    """

    adapters: int = 100_000
    compositions: int = 1_000_000
    terms: int = 4
    adapter_exponent: float = 0.8
    weightings: int = 10
    exponent: float = 1.0


@dataclass(frozen=True)
class Traffic:
    """Requests in the order of time.

    Attributes:
        compositions: what each asks for.
        times: when, in seconds.
        sets: the set of adapters of each composition. adapters: of each set, [sets, terms].
    """

    compositions: Ids
    times: NDArray[np.float64]
    sets: Ids
    adapters: NDArray[np.int32]

    @property
    def sources(self) -> int:
        """Adapters are numbered below it."""
        return int(self.adapters.max()) + 1


def zipf(count: int, exponent: float) -> NDArray[np.float64]:
    """The probabilities of `count` items, the k-th of them in proportion to k^−exponent."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def draw(probabilities: NDArray[np.float64], shape: int | tuple[int, ...], random: np.random.Generator) -> Ids:
    """Items by their probabilities."""
    steps = np.cumsum(probabilities)
    return np.searchsorted(steps, random.random(shape) * steps[-1], side="right")


def traffic(
    population: Population,
    requests: int,
    rate: float,
    seed: int,
    *,
    new_per_hour: float = 0.0,
    flash_share: float = 0.0,
    flash_from: float = 0.5,
) -> Traffic:
    """Independent requests at random times (Poisson), `rate` a second.

    Args:
        new_per_hour: new compositions; each takes the place of one that is chosen as requests choose theirs, so that what is
            popular is what changes most.
        flash_share: of all requests, that go to one new composition from some moment on.
        flash_from: that moment, as a share of the requests.
    """
    random = np.random.default_rng(seed)
    popularity = zipf(population.compositions, population.exponent)
    times = np.cumsum(random.exponential(1 / rate, requests))
    births = random.poisson(new_per_hour / 3600 * times[-1])
    asked = draw(popularity, requests, random)
    if births:
        asked = _renewed(asked, times, draw(popularity, births, random), population.compositions, random)
    total = population.compositions + births
    if flash_share:
        first = int(flash_from * requests)
        asked[first:][random.random(requests - first) < flash_share] = total
        total += 1
    count = -(-total // population.weightings)
    sets = random.permutation(np.arange(total) // population.weightings)
    return Traffic(asked, times, sets, _adapters(population, count, random))


def _renewed(asked: Ids, times: NDArray[np.float64], places: Ids, first: int, random: np.random.Generator) -> Ids:
    """`asked`, with the places of popularity in `places` given to compositions from the number `first` on, one by one."""
    moments = np.sort(random.uniform(0, times[-1], len(places)))
    holder = np.arange(first)
    renewed = asked.copy()
    ends = np.append(np.searchsorted(times, moments), len(times))
    for number, place in enumerate(places):
        holder[place] = first + number
        part = slice(ends[number], ends[number + 1])
        renewed[part] = holder[asked[part]]
    return renewed


def _adapters(population: Population, count: int, random: np.random.Generator) -> NDArray[np.int32]:
    """The adapters of each of `count` sets, none twice in one."""
    popularity = zipf(population.adapters, population.adapter_exponent)
    rows = draw(popularity, (count, population.terms), random)
    while True:
        ordered = np.sort(rows, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not twice.any():
            return rows.astype(np.int32)
        rows[twice] = draw(popularity, (int(twice.sum()), population.terms), random)
