"""Room for merged factors: tensors that a merge writes into, wherever they lie.

Shape suffixes as in pool.py; D is I or O.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
        address_L: of each, int64.
        frame_3L: int32; of each, the elements from row to row (side A) or from column to column (side B), then the first entry
            and the number of entries of the window of D that it holds.
        rank: K. dtype: of all.
        units_fast: whether units, not D, lie next to each other in memory (side B).
        aligned: whether rows lie at multiples of 16 bytes, and windows start and end at multiples of 8 entries.
        progress: told how many modules more are written, if anyone wants to know.
    """

    rooms: Sequence[Tensor] | Stacked
    address_L: np.ndarray
    frame_3L: np.ndarray
    rank: int
    dtype: torch.dtype
    units_fast: bool
    aligned: bool
    progress: Callable[[int], None] | None = None

    def put(self, rows: slice, x_LKD: Tensor) -> None:
        """Write merged rows of the modules `rows`, of one shape, over all of D; and zeros beyond them."""
        if isinstance(self.rooms, Stacked):
            self.rooms[rows].copy_(x_LKD)
        else:
            k = x_LKD.shape[1]
            _, first_L, width_L = self.frame_3L[:, rows]
            for room, first, width, x_KD in zip(self.rooms[rows], first_L, width_L, x_LKD, strict=True):
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
    address_L = np.array([room.data_ptr() for room in rooms], np.int64)
    strides = [room.stride(1 if units_fast else 0) for room in rooms]
    frame_3L = np.array([strides, first, [room.shape[1] for room in rooms]], np.int32)
    dtype = rooms[0].dtype
    return Target(rooms, address_L, frame_3L, rooms[0].shape[0], dtype, units_fast, _aligned(address_L, frame_3L, dtype))


def _aligned(address_L: np.ndarray, frame_3L: np.ndarray, dtype: torch.dtype) -> bool:
    stride_L, first_L, width_L = frame_3L
    return not any((x % y).any() for x, y in ((address_L, 16), (stride_L, 16 // dtype.itemsize), (first_L, 8), (width_L, 8)))


class _Side(NamedTuple):
    """Where one side of the modules lies in a Shelf: bytes from its start, and as Target has it."""

    offset_L: np.ndarray
    frame_3L: np.ndarray
    aligned: bool


class _Place(NamedTuple):
    """A stack in flat memory."""

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    start: int


@dataclass(frozen=True)
class Shelf:
    """How the merged modules of a layout lie in one flat piece of memory, one block after another; both sides.

    Attributes:
        entries: of all. dtype: of all.
        places: of each block's two stacks, as arguments of `as_strided`: A (L, K, I), and B (L, K, O) with K lying
            closest, so that each module's B is contiguous as engines take it.
    """

    entries: int
    dtype: torch.dtype
    places: tuple[tuple[_Place, _Place], ...]
    _sides: tuple[_Side, _Side]

    def stacks(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The stacks a_LKI and b_LKO of each block."""
        return [(memory.as_strided(*a), memory.as_strided(*b)) for a, b in self.places]

    def targets(
        self, memory: Tensor, stacks: Sequence[tuple[Tensor, Tensor]], progress: Callable[[int], None] | None
    ) -> tuple[Target, Target]:
        """All of it, to be written; the progress is that of side B, which comes last.

        Args:
            memory: starts at a multiple of 16 bytes, as all of torch's does.
        """
        rank, start = stacks[0][0].shape[1], memory.data_ptr()
        a, b = [
            Target(
                Stacked([pair[side] for pair in stacks]), start + lies.offset_L, lies.frame_3L, rank, self.dtype,
                side == 1, lies.aligned, progress if side else None,
            )
            for side, lies in enumerate(self._sides)
        ]  # fmt: skip
        return a, b


@lru_cache(maxsize=256)
def shelf(layout: PoolLayout, rank: int, dtype: torch.dtype) -> Shelf:
    """Room for the merged modules of a layout, each stack at a multiple of 16 bytes."""
    entries, places = 0, []
    starts: tuple[list[int], list[int]] = ([], [])
    for block in layout.blocks:
        count, pair = len(block.modules), []
        for side, width in enumerate((block.inputs, block.outputs)):
            size = rank * width
            starts[side].extend(range(entries, entries + count * size, size))
            strides = (size, 1, rank) if side else (size, width, 1)
            pair.append(_Place((count, rank, width), strides, entries))
            entries += -(-count * size // 8) * 8
        places.append((pair[0], pair[1]))
    a, b = [
        _lying(dtype.itemsize * np.array(starts[side], np.int64), rank if side else widths, widths, dtype)
        for side, widths in enumerate((layout.inputs, layout.outputs))
    ]
    return Shelf(entries, dtype, tuple(places), (a, b))


def _lying(offset_L: np.ndarray, stride: int | Sequence[int], widths: Sequence[int], dtype: torch.dtype) -> _Side:
    frame_3L = np.stack([np.broadcast_to(x, len(widths)) for x in (stride, 0, widths)]).astype(np.int32)
    return _Side(offset_L, frame_3L, _aligned(offset_L, frame_3L, dtype))
