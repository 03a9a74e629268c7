"""merge and merge_into: adapters and a spec in, one merged adapter out."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from merging.adapter import LoraAdapter, Stack, StackedModules
from merging.assembly import assemble
from merging.errors import RecipeError
from merging.layout import PoolLayout, lay_out
from merging.pool import brought, pool_of
from merging.room import Rooms, Target, shelf
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
        progress: told how many modules more are done, now and then (on a GPU, where nobody has to wait, not at all).

    Returns:
        An adapter whose scalings are folded into its factors (scaling 1).

    Raises:
        RecipeError: where the method cannot merge these adapters, or k is larger than all their ranks together.
    """
    device = torch.device(device)
    sources, terms, layouts = _prepare(adapters, spec, device)
    stacks: list[Stack] = []
    for layout in layouts:
        room = shelf(layout, spec.method.rank(layout.ranks, spec.options), dtype)
        memory = torch.empty(room.entries, dtype=dtype, device=device)
        merged = room.stacks(memory)
        _run(layout, sources, terms, spec, *room.targets(memory, merged, progress))
        stacks += [
            Stack(block.modules, *factors, (1.0,) * len(block.modules))
            for block, factors in zip(layout.blocks, merged, strict=True)
        ]
    bases = {source.base_model for source in sources}
    return LoraAdapter(StackedModules(stacks), base_model=bases.pop() if len(bases) == 1 else None)


def merge_into(adapters: Mapping[str, LoraAdapter], spec: MergeSpec, rooms: Rooms) -> None:
    """Merge as `merge` does, straight into `rooms`; those of modules that the recipe does not touch become zeros.

    The device is that of the rooms. On a GPU the work is queued on the current stream, and the adapters must stay as they
    are until it is done.

    Raises:
        RecipeError: as `merge`, and where a merged module has no room or a rank over its room's. Nothing is written then.
    """
    device = next(iter(rooms.values())).a_KI.device
    sources, terms, layouts = _prepare(adapters, spec, device)
    targets = [rooms.targets(layout.modules) for layout in layouts]
    for layout, (a, _) in zip(layouts, targets, strict=True):
        rank = spec.method.rank(layout.ranks, spec.options)
        if rank > a.rank:
            raise RecipeError(f"the merge has rank {rank}, over the {a.rank} that there is room for", "rank")
    for layout, (a, b) in zip(layouts, targets, strict=True):
        _run(layout, sources, terms, spec, a, b)
    rooms.clear(except_for=tuple(layout.modules for layout in layouts))


def _prepare(
    adapters: Mapping[str, LoraAdapter], spec: MergeSpec, device: torch.device
) -> tuple[list[LoraAdapter], list[Term], tuple[PoolLayout, ...]]:
    """The sources on the device and their terms, in the merge's order, and the layouts of its pools."""
    terms = ordered(adapters, spec)
    sources = [adapters[term.adapter] for term in terms]
    for term, source in zip(terms, sources, strict=True):
        term.check(source.modules)
    layouts = lay_out(sources, terms, device)
    _rank(spec, [layout.ranks for layout in layouts])
    return brought(sources, device), terms, layouts


def _run(
    layout: PoolLayout, sources: Sequence[LoraAdapter], terms: Sequence[Term], spec: MergeSpec, a: Target, b: Target
) -> None:
    if sources[0].stacks[0].a_LRI.is_cuda:
        from merging.cuda_plan import run_plan  # Triton is there with CUDA only

        run_plan(layout, sources, terms, spec, a, b)
    else:
        pool = pool_of(layout, sources, terms, (a, b))
        assemble(pool, spec.method.assemble(pool, spec.options))


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
    for term in spec.terms:
        term.check(ranks_of[term.adapter])
    return _rank(spec, set(map(tuple, _columns(spec, ranks_of).values())))


def merged_ranks(spec: MergeSpec, ranks_of: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The rank of each module of what merging a checked `spec` gives, without merging; arguments as of check_rank."""
    return {module: spec.method.rank(column, spec.options) for module, column in _columns(spec, ranks_of).items()}


def _columns(spec: MergeSpec, ranks_of: Mapping[str, Mapping[str, int]]) -> dict[str, list[int]]:
    """The ranks of the adapters that count in each module."""
    columns: dict[str, list[int]] = {}
    for term in spec.terms:
        for module, rank in ranks_of[term.adapter].items():
            if term.at(module) != 0:
                columns.setdefault(module, []).append(rank)
    return columns


def _rank(spec: MergeSpec, columns: Collection[Sequence[int]]) -> int:
    """The largest rank of any module, given the ranks of the adapters that count in each (distinct ones suffice)."""
    if not columns:
        raise RecipeError("every weight is 0 in every module; name the base model instead", "weight")
    asked = getattr(spec.options, "rank", None)
    most = max(map(sum, columns))
    if asked is not None and asked > most:
        raise RecipeError(f"rank {asked} is over {most}, the ranks of all the adapters together; use {most} or less", "rank")
    return max(spec.method.rank(column, spec.options) for column in columns)
