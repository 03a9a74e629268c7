"""Choose a method's options and weights by held-out loss: a small search, one thing after another."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merging.adapter import LoraAdapter
from merging.fit.errors import FitError
from merging.fit.loss import Loss, held_out_loss
from merging.fit.rows import Rows
from merging.merge import merge, ranks
from merging.spec import MergeSpec
from merging.term import Term

_FACTORS = (0.5, 0.7, 1.4, 2.0)
_NORMS = ("inf", "2")
_DENSITIES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Try:
    """A recipe, and the held-out loss of what it merges to."""

    spec: MergeSpec
    loss: float


@dataclass(frozen=True)
class Search:
    """All that was tried, in order; the first is the method's defaults at weights 1."""

    tries: tuple[Try, ...]

    @property
    def best(self) -> Try:
        return min(self.tries, key=lambda tried: tried.loss)


def search(
    model: Any,
    adapters: Mapping[str, LoraAdapter],
    method: str,
    rows: Rows,
    *,
    loss: Loss = "answer",
    batch: int = 32,
    progress: Callable[[int, int, float], None] | None = None,
) -> Search:
    """Try a method's options (rank, norm, density), then a factor on all weights, then one on each; the best goes on each time.

    Each recipe is merged as `merge` does, and judged on `rows` beside the model, which is left as it was.

    Args:
        model: a causal language model of transformers.
        progress: told (recipes tried, recipes at most, loss) after each.

    Raises:
        AdapterError: where an adapter does not fit the model.
        RecipeError: where the method cannot merge these adapters, or is unknown.
        FitError: where the loss of the method's defaults is not finite.
    """
    here = {name: adapter.to(model.device) for name, adapter in adapters.items()}
    best = MergeSpec.create(method, [Term(name) for name in adapters])
    stages = list(_stages(best, adapters))
    most = 1 + sum(len(stage) for stage in stages)
    tries: dict[MergeSpec, float] = {}

    def judged(spec: MergeSpec) -> float:
        if spec not in tries:
            merged = merge(here, spec, device=model.device, dtype=model.dtype)
            found = held_out_loss(model, {"merged": merged}, [Term("merged")], rows, loss=loss, batch=batch)
            tries[spec] = found if math.isfinite(found) else math.inf
            if progress is not None:
                progress(len(tries), most, found)
        return tries[spec]

    if math.isinf(judged(best)):
        raise FitError(f"{method} with its defaults has no finite loss on the held-out rows; look at the adapters")
    for stage in stages:
        best = min([best, *(change(best) for change in stage)], key=judged)
    return Search(tuple(Try(spec, found) for spec, found in tries.items()))


Change = Callable[[MergeSpec], MergeSpec]


def _stages(spec: MergeSpec, adapters: Mapping[str, LoraAdapter]) -> Iterator[list[Change]]:
    for option, values in (("rank", _ranks(adapters)), ("norm", _NORMS), ("density", _DENSITIES)):
        if hasattr(spec.options, option):
            yield [_with(option, value) for value in values]
    yield [_scaled(adapters, factor) for factor in _FACTORS]
    if len(adapters) > 1:
        for name in adapters:
            yield [_scaled([name], factor) for factor in _FACTORS]


def _ranks(adapters: Mapping[str, LoraAdapter]) -> list[int]:
    """Beside the default, the largest rank of any adapter: half of it, all ranks of a module together, and between."""
    ranks_of = [ranks(adapter) for adapter in adapters.values()]
    single = max(max(column.values()) for column in ranks_of)
    whole = max(sum(column.get(module, 0) for column in ranks_of) for module in set().union(*ranks_of))
    return sorted({max(1, single // 2), (single + whole) // 2, whole} - {single})


def _with(option: str, value: Any) -> Change:
    return lambda spec: MergeSpec.create(spec.method.name, spec.terms, {**dataclasses.asdict(spec.options), option: value})


def _scaled(names: Collection[str], factor: float) -> Change:
    def change(spec: MergeSpec) -> MergeSpec:
        terms = [Term(t.adapter, t.weight * factor) if t.adapter in names else t for t in spec.terms]
        return MergeSpec.create(spec.method.name, terms, dataclasses.asdict(spec.options))

    return change
