"""merge: adapters and a spec in, one merged adapter out. The one entry point."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from merging.adapter import LoraAdapter, Stack, StackedModules
from merging.assembly import assemble
from merging.errors import RecipeError
from merging.pool import pool_units
from merging.spec import MergeSpec
from merging.term import Term


def merge(
    adapters: Mapping[str, LoraAdapter],
    spec: MergeSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int], None] | None = None,
) -> LoraAdapter:
    """Merge `spec.terms` of `adapters`.

    Terms are taken in the order of their adapters' digests, as in the content key, so equal keys give equal bytes
    on one device.

    Args:
        adapters: by name; every adapter of the spec must be there. Ranks, scalings and target modules may differ.
        device: where to merge; the result stays there.
        dtype: of the result; sums are accumulated in float32.
        progress: told how many modules more are done, now and then.

    Returns:
        An adapter whose scalings are folded into its factors (scaling 1).

    Raises:
        RecipeError: where the method cannot merge these adapters, or k is larger than all their ranks together.
    """
    terms = ordered(adapters, spec)
    sources = [adapters[term.adapter] for term in terms]
    for term, source in zip(terms, sources, strict=True):
        term.check(source.modules)
    pools = pool_units(sources, terms, torch.device(device))
    _rank(spec, [pool.ranks for pool in pools])
    merged: list[Stack] = []
    for pool in pools:
        assembly = spec.method.assemble(pool, spec.options)
        start = 0
        for block in pool.blocks:
            merged.append(assemble(block, assembly, start, dtype))
            start += len(block.modules)
            if progress is not None:
                progress(len(block.modules))
    bases = {source.base_model for source in sources}
    return LoraAdapter(StackedModules(merged), base_model=bases.pop() if len(bases) == 1 else None)


def ordered(adapters: Mapping[str, LoraAdapter], spec: MergeSpec) -> list[Term]:
    """The terms as a merge takes them: by their adapters' digests."""
    return sorted(spec.terms, key=lambda term: (adapters[term.adapter].digest, term.weight, term.by_module))


def ranks(adapter: LoraAdapter) -> dict[str, int]:
    """The rank of each module."""
    return {name: stack.a_LRI.shape[1] for stack in adapter.stacks for name in stack.names}


def check_rank(spec: MergeSpec, ranks_of: Mapping[str, Mapping[str, int]]) -> int:
    """The rank that merging `spec` gives (the largest of any module), without merging.

    Args:
        ranks_of: for each adapter of the spec, the rank of each of its modules.

    Raises:
        RecipeError: where the method cannot merge such ranks, or the asked rank is over all of them together.
    """
    columns: dict[str, list[int]] = {}
    for term in spec.terms:
        term.check(ranks_of[term.adapter])
        for module, rank in ranks_of[term.adapter].items():
            if term.at(module) != 0:
                columns.setdefault(module, []).append(rank)
    return _rank(spec, set(map(tuple, columns.values())))


def _rank(spec: MergeSpec, columns: Collection[Sequence[int]]) -> int:
    """The largest rank of any module, given the ranks of the adapters that count in each (distinct ones suffice)."""
    if not columns:
        raise RecipeError("every weight is 0 in every module; name the base model instead", "weight")
    asked = getattr(spec.options, "rank", None)
    most = max(map(sum, columns))
    if asked is not None and asked > most:
        raise RecipeError(f"rank {asked} is over {most}, the ranks of all the adapters together; use {most} or less", "rank")
    return max(spec.method.rank(column, spec.options) for column in columns)
