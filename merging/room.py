"""Room for merged factors: tensors that a merge writes into, wherever they lie.

Shape suffixes as in pool.py; D is I or O.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merging.errors import RecipeError
from merging.layout import PoolLayout


@dataclass(frozen=True, slots=True)
class Room:
    """Where the factors of one merged module go.

    An engine that shards a module over several GPUs holds a part of one factor: a window of its inputs or its outputs.

    Attributes:
        a_KI: rows are merged units, I the inputs from `first_input` on.
        b_OK: columns are merged units, O the outputs from `first_output` on; the same K and dtype.
            A merge of a rank below K fills the rest with zeros.
    """

    a_KI: Tensor
    b_OK: Tensor
    first_input: int = 0
    first_output: int = 0


class Stacked:
    """Stacks (L, K, D), one after another."""

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        self._stacks = stacks

    def __getitem__(self, rows: slice) -> Tensor:
        """Modules of one stack, (L, K, D)."""
        start = rows.start
        for x_LKD in self._stacks:
            if start < len(x_LKD):
                return x_LKD[start : start + rows.stop - rows.start]
            start -= len(x_LKD)
        raise IndexError(rows)


@dataclass(frozen=True, eq=False)
class Target:
    """One side of some modules' rooms, in the order in which a merge writes them.

    Attributes:
        rooms: (K, D) a module, or whole factors in stacks; on side B transposed views of tensors (O, K).
        first_L, width_L: the window of D that each holds; int32.
        address_L: of each, int64; stride_L: elements from row to row (side A) or from column to column (side B); int32.
        rank: K. dtype: of all.
        units_fast: whether units, not D, lie next to each other in memory (side B).
        progress: told how many modules more are written, if anyone wants to know.
    """

    rooms: Sequence[Tensor] | Stacked
    first_L: np.ndarray
    width_L: np.ndarray
    address_L: np.ndarray
    stride_L: np.ndarray
    rank: int
    dtype: torch.dtype
    units_fast: bool
    progress: Callable[[int], None] | None = None

    @cached_property
    def aligned(self) -> bool:
        """Whether rows lie at multiples of 16 bytes, and windows start and end at multiples of 8 entries."""
        uneven = (self.address_L % 16, self.stride_L % (16 // self.dtype.itemsize), self.first_L % 8, self.width_L % 8)
        return not any(rest.any() for rest in uneven)

    def put(self, rows: slice, x_LKD: Tensor) -> None:
        """Write merged rows of the modules `rows`, of one shape, over all of D; and zeros beyond them."""
        if isinstance(self.rooms, Stacked):
            self.rooms[rows].copy_(x_LKD)
        else:
            k = x_LKD.shape[1]
            for room, first, width, x_KD in zip(self.rooms[rows], self.first_L[rows], self.width_L[rows], x_LKD, strict=True):
                room[:k] = x_KD[:, first : first + width]
                room[k:] = 0
        if self.progress is not None:
            self.progress(len(x_LKD))


class Rooms(Mapping[str, Room]):
    """Rooms by module name; all of one rank and dtype on one device."""

    def __init__(self, rooms: Mapping[str, Room]) -> None:
        self._rooms = dict(rooms)
        self._targets: dict[tuple[str, ...], tuple[Target, Target]] = {}
        self._others: dict[tuple[tuple[str, ...], ...], list[Tensor]] = {}

    def __getitem__(self, name: str) -> Room:
        return self._rooms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rooms)

    def __len__(self) -> int:
        return len(self._rooms)

    def targets(self, modules: tuple[str, ...]) -> tuple[Target, Target]:
        """The two sides of some modules' rooms.

        Raises:
            RecipeError: for a module that has no room.
        """
        if modules not in self._targets:
            missing = next((name for name in modules if name not in self._rooms), None)
            if missing is not None:
                raise RecipeError(f"there is no room for module {missing}; merge adapters of this model", "adapters")
            rooms = [self._rooms[name] for name in modules]
            self._targets[modules] = (
                _target([room.a_KI for room in rooms], [room.first_input for room in rooms], units_fast=False),
                _target([room.b_OK.mT for room in rooms], [room.first_output for room in rooms], units_fast=True),
            )
        return self._targets[modules]

    def clear(self, *, except_for: tuple[tuple[str, ...], ...]) -> None:
        """Fill all other rooms with zeros."""
        if except_for not in self._others:
            kept = {name for modules in except_for for name in modules}
            others = [room for name, room in self._rooms.items() if name not in kept]
            self._others[except_for] = [factor for room in others for factor in (room.a_KI, room.b_OK)]
        if self._others[except_for]:
            torch._foreach_zero_(self._others[except_for])


def _target(rooms: list[Tensor], first: list[int], *, units_fast: bool) -> Target:
    return Target(
        rooms,
        np.array(first, np.int32),
        np.array([room.shape[1] for room in rooms], np.int32),
        np.array([room.data_ptr() for room in rooms], np.int64),
        np.array([room.stride(1 if units_fast else 0) for room in rooms], np.int32),
        rooms[0].shape[0],
        rooms[0].dtype,
        units_fast,
    )


class _Side(NamedTuple):
    """Where one side of the modules lies in a Shelf: first entries, strides between rows (side B: columns), widths."""

    start_L: np.ndarray
    stride_L: np.ndarray
    width_L: np.ndarray


@dataclass(frozen=True)
class Shelf:
    """How the merged modules of a layout lie in one flat piece of memory, one block after another; both sides.

    Attributes:
        entries: of all.
        shapes: of each block's two stacks, with the entry where it starts: A (L, K, I), and B (L, O, K), so that each
            module's B is contiguous as engines take it.
    """

    entries: int
    shapes: tuple[tuple[tuple[int, tuple[int, int, int]], tuple[int, tuple[int, int, int]]], ...]
    _first_L: np.ndarray
    _sides: tuple[_Side, _Side]

    def stacks(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The stacks a_LKI and b_LKO of each block."""
        return [
            (memory[a : a + prod(shape_a)].view(shape_a), memory[b : b + prod(shape_b)].view(shape_b).mT)
            for (a, shape_a), (b, shape_b) in self.shapes
        ]

    def targets(
        self, memory: Tensor, stacks: Sequence[tuple[Tensor, Tensor]], progress: Callable[[int], None] | None
    ) -> tuple[Target, Target]:
        """All of it, to be written; the progress is that of side B, which comes last."""
        rank = stacks[0][0].shape[1]
        a, b = [
            Target(
                Stacked([pair[side] for pair in stacks]), self._first_L, lies.width_L,
                memory.data_ptr() + memory.itemsize * lies.start_L, lies.stride_L, rank,
                memory.dtype, side == 1, progress if side else None,
            )
            for side, lies in enumerate(self._sides)
        ]  # fmt: skip
        return a, b


@lru_cache(maxsize=256)
def shelf(layout: PoolLayout, rank: int) -> Shelf:
    """Room for the merged modules of a layout, each stack at a multiple of 16 bytes."""
    entries, shapes = 0, []
    lines: tuple[list[_Side], list[_Side]] = ([], [])
    for block in layout.blocks:
        count, pair = len(block.modules), []
        for side, width, shape in (
            (lines[0], block.inputs, (count, rank, block.inputs)),
            (lines[1], block.outputs, (count, block.outputs, rank)),
        ):
            pair.append((entries, shape))
            starts_L = entries + rank * width * np.arange(count, dtype=np.int64)
            side.append(_Side(starts_L, np.full(count, shape[2], np.int32), np.full(count, width, np.int32)))
            entries += -(-prod(shape) // 8) * 8
        shapes.append((pair[0], pair[1]))
    a, b = [_Side(*map(np.concatenate, zip(*side, strict=True))) for side in lines]
    return Shelf(entries, tuple(shapes), np.zeros(len(layout.modules), np.int32), (a, b))
