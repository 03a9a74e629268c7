"""merge: adapters and a spec in, one merged adapter out. The one entry point."""

from collections.abc import Mapping

import torch

from merging.adapter import LoraAdapter, LoraModule
from merging.assembly import assemble
from merging.errors import RecipeError
from merging.pool import stack_units
from merging.spec import MergeSpec


def merge(
    adapters: Mapping[str, LoraAdapter],
    spec: MergeSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> LoraAdapter:
    """Merge `spec.terms` of `adapters`.

    Terms are taken in the order of their adapters' digests, as in the content key, so equal keys give equal bytes
    on one device.

    Args:
        adapters: by name; every adapter of the spec must be there. Ranks, scalings and target modules may differ.
        device: where to merge; the result stays there.
        dtype: of the result; sums are accumulated in float32.

    Returns:
        An adapter whose scalings are folded into its factors (scaling 1).

    Raises:
        RecipeError: where the method cannot merge these adapters, or k is larger than all their ranks together.
    """
    terms = sorted(spec.terms, key=lambda term: (adapters[term.adapter].digest, term.weight))
    sources = [adapters[term.adapter] for term in terms]
    check_rank(spec, {term.adapter: ranks(adapters[term.adapter]) for term in terms})
    merged: dict[str, LoraModule] = {}
    for block in stack_units(sources, [term.weight for term in terms], torch.device(device)):
        a_LKI, b_LOK = assemble(block, spec.method.assemble(block, spec.options), dtype)
        for name, a, b in zip(block.modules, a_LKI, b_LOK, strict=True):
            merged[name] = LoraModule(a, b)
    bases = {source.base_model for source in sources}
    return LoraAdapter(merged, base_model=bases.pop() if len(bases) == 1 else None)


def ranks(adapter: LoraAdapter) -> dict[str, int]:
    """The rank of each module."""
    return {name: module.rank for name, module in adapter.modules.items()}


def check_rank(spec: MergeSpec, ranks_of: Mapping[str, Mapping[str, int]]) -> int:
    """The rank that merging `spec` gives (the largest of any module), without merging.

    Args:
        ranks_of: for each adapter of the spec, the rank of each of its modules.

    Raises:
        RecipeError: where the method cannot merge such ranks, or the asked rank is over all of them together.
    """
    columns: dict[str, list[int]] = {}
    for term in spec.terms:
        for module, rank in ranks_of[term.adapter].items():
            columns.setdefault(module, []).append(rank)
    distinct = set(map(tuple, columns.values()))
    asked = getattr(spec.options, "rank", None)
    most = max(map(sum, distinct))
    if asked is not None and asked > most:
        raise RecipeError(f"rank {asked} is over {most}, the ranks of all the adapters together; use {most} or less", "rank")
    return max(spec.method.rank(column, spec.options) for column in distinct)
