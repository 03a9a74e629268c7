"""Layouts: which modules of some adapters lie where, and which can be merged together; free of any numbers.

A server merges the same few layouts again and again, so they are worked out once and kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import torch

from merging.adapter import LoraAdapter
from merging.errors import RecipeError
from merging.term import Term

# Entries of one pool's Gram matrices, so that small problems stay small beside the factors; a GPU likes many at a time.
_GRAM_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 23}


@dataclass(frozen=True)
class StackOutline:
    """What a layout must know of a stack: its modules ("" where the adapter has weight 0), and its factors' shape."""

    names: tuple[str, ...]
    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True, eq=False)
class Outline:
    """The outlines of an adapter's stacks."""

    stacks: tuple[StackOutline, ...]


@dataclass(frozen=True)
class Member:
    """An adapter's part in a block: its place in the merge, its stack's number, and its rows there, a range if together."""

    place: int
    stack: int
    rows: range | tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Modules that lie in the same stacks, hence of one shape."""

    modules: tuple[str, ...]
    members: tuple[Member, ...]
    inputs: int
    outputs: int


@dataclass(frozen=True, eq=False)
class PoolLayout:
    """Blocks that the same adapters adapt in the same ranks, one after another.

    Attributes:
        adapters: places of the T adapters in the merge's order.
        ranks: of each.
    """

    blocks: tuple[Block, ...]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """L names."""
        return tuple(name for block in self.blocks for name in block.modules)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """d_in of each module."""
        return tuple(block.inputs for block in self.blocks for _ in block.modules)

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """d_out of each module."""
        return tuple(block.outputs for block in self.blocks for _ in block.modules)


def lay_out(adapters: Sequence[LoraAdapter], terms: Sequence[Term], device: torch.device) -> tuple[PoolLayout, ...]:
    """The layouts of the pools of a merge on `device`. An adapter with weight 0 in a module has no part in it.

    Raises:
        RecipeError: where two adapters disagree about the shape of a module (they have different base models).
    """
    outlines = tuple(_outline(adapter, term) for adapter, term in zip(adapters, terms, strict=True))
    return _lay_out(outlines, _GRAM_ENTRIES[device.type])


def _outline(adapter: LoraAdapter, term: Term) -> Outline:
    if not term.by_module:
        outline = _outlines.get(adapter)
        if outline is None:
            outline = _outlines[adapter] = _interned(_stacks(adapter, lambda name: True))
        return outline
    return _interned(_stacks(adapter, lambda name: term.at(name) != 0))


def _stacks(adapter: LoraAdapter, counts: Callable[[str], bool]) -> tuple[StackOutline, ...]:
    return tuple(
        StackOutline(
            tuple(name if counts(name) else "" for name in stack.names),
            stack.a_LRI.shape[1],
            stack.a_LRI.shape[2],
            stack.b_LRO.shape[2],
        )
        for stack in adapter.stacks
    )


# Outlines are compared at every merge, and hundreds of names are much to compare; so equal ones are one object.
_outlines: WeakKeyDictionary[LoraAdapter, Outline] = WeakKeyDictionary()


@lru_cache(maxsize=4096)
def _interned(stacks: tuple[StackOutline, ...]) -> Outline:
    return Outline(stacks)


@lru_cache(maxsize=64)
def _lay_out(outlines: tuple[Outline, ...], gram_entries: int) -> tuple[PoolLayout, ...]:
    pools: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Block]] = {}
    for block in _blocks([outline.stacks for outline in outlines]):
        ranks = tuple(outlines[member.place].stacks[member.stack].rank for member in block.members)
        pools.setdefault((tuple(member.place for member in block.members), ranks), []).append(block)
    return tuple(
        PoolLayout(tuple(some), places, ranks)
        for (places, ranks), blocks in pools.items()
        for some in _bounded(blocks, max(1, gram_entries // sum(ranks) ** 2))
    )


def _blocks(outlines: Sequence[tuple[StackOutline, ...]]) -> list[Block]:
    places = [
        {name: (number, row) for number, stack in enumerate(stacks) for row, name in enumerate(stack.names) if name}
        for stacks in outlines
    ]
    by_stacks: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(set().union(*places)):
        by_stacks.setdefault(tuple(place[name][0] if name in place else -1 for place in places), []).append(name)
    blocks = []
    for stacks, names in by_stacks.items():
        members = []
        for place, stack in enumerate(stacks):
            if stack >= 0:
                rows = tuple(places[place][name][1] for name in names)
                together = range(rows[0], rows[0] + len(rows))
                members.append(Member(place, stack, together if rows == tuple(together) else rows))
        shapes = {(outlines[m.place][m.stack].outputs, outlines[m.place][m.stack].inputs) for m in members}
        if len(shapes) > 1:
            raise RecipeError(
                f"adapters disagree about the shape of {names[0]}: {sorted(shapes)}; they have different base models",
                "adapters",
            )
        ((outputs, inputs),) = shapes
        blocks.append(Block(tuple(names), tuple(members), inputs, outputs))
    return blocks


def _bounded(blocks: Sequence[Block], most: int) -> list[list[Block]]:
    """The blocks in lots of at most `most` modules; a block is cut where it has to be."""
    lots: list[list[Block]] = [[]]
    left = most
    for block in blocks:
        start, count = 0, len(block.modules)
        while start < count:
            if left == 0:
                lots.append([])
                left = most
            end = min(count, start + left)
            lots[-1].append(block if end - start == count else _cut(block, start, end))
            left -= end - start
            start = end
    return lots


def _cut(block: Block, start: int, end: int) -> Block:
    members = [Member(m.place, m.stack, m.rows[start:end]) for m in block.members]
    return Block(block.modules[start:end], tuple(members), block.inputs, block.outputs)
