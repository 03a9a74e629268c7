"""Where factors lie on the GPU: tables of addresses, from which kernels find every unit of every module in one launch.

The tables are tensors that stay where they are; what they say changes from merge to merge, so that a CUDA graph of
the launches serves every merge of one layout. All that changes goes over in one copy.

Shape suffixes as in pool.py; D is I or O.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from merging.adapter import LoraAdapter, Stack, StackedModules
from merging.layout import PoolLayout
from merging.pool import owner_of_unit, scalings, weights
from merging.room import Target
from merging.term import Term

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class SideTable:
    """One side of a pool: for each of L modules, the rows of T adapters.

    Attributes:
        address_LT: int64 on the GPU: of adapter t's rows in module l, (R_t, D_l) contiguous.
        width_L: int32 on the GPU, D_l; widths: the same on the host.
        owner_N, row_N: int32 on the GPU: the adapter of each unit, and its row there.
        ranks: R_t, on the host.
        dtype: of all factors.
        aligned: whether factors start at multiples of 16 bytes, and widths are multiples of 8.
    """

    address_LT: Tensor
    width_L: Tensor
    widths: tuple[int, ...]
    owner_N: Tensor
    row_N: Tensor
    ranks: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    @property
    def constants(self) -> dict[str, object]:
        """What kernels are compiled for."""
        return {"SOURCE": _DTYPES[self.dtype], "ALIGNED": self.aligned}


@dataclass(frozen=True)
class TargetTable:
    """Where one side of the merged modules goes: entry (k, d) at address_L + k · stride_k_L + d · stride_d_L elements.

    Attributes:
        address_L: int64 on the GPU.
        stride_k_L, stride_d_L: int32 on the GPU, in elements; one of them is 1.
        first_L, width_L: int32 on the GPU, the window of D that is kept; widths: the most it can be, on the host.
        rank: rows to write; those beyond the merged rank become zeros.
        dtype: of the merged factors.
        units_fast: whether stride_k is 1, rather than stride_d.
        aligned: see Target.aligned.
    """

    address_L: Tensor
    stride_k_L: Tensor
    stride_d_L: Tensor
    first_L: Tensor
    width_L: Tensor
    widths: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    units_fast: bool
    aligned: bool

    @property
    def constants(self) -> dict[str, object]:
        """What kernels are compiled for."""
        return {"RESULT": _DTYPES[self.dtype], "UNITS_FAST": self.units_fast, "ROOM_ALIGNED": self.aligned}


@dataclass(frozen=True, slots=True)
class Column:
    """One adapter's part in a layout.

    Attributes:
        address_2L: int64, of its rows in each module, sides A and B. scaling_L: float64.
    """

    address_2L: np.ndarray
    scaling_L: np.ndarray


# A server merges the same adapters again and again; a column is most of what the host would have to do for it.
_columns: WeakKeyDictionary[LoraAdapter, dict[tuple[PoolLayout, int], Column]] = WeakKeyDictionary()


def column(adapter: LoraAdapter, layout: PoolLayout, t: int) -> Column:
    """The part of the layout's adapter number `t`."""
    known = _columns.setdefault(adapter, {})
    part = known.get((layout, t))
    if part is None:
        parts = []
        for block in layout.blocks:
            member = block.members[t]
            stack = adapter.stacks[member.stack]
            rows = np.array(member.rows)
            parts.append([x.data_ptr() + x.stride(0) * x.element_size() * rows for x in (stack.a_LRI, stack.b_LRO)])
        part = known[layout, t] = Column(np.concatenate(parts, axis=1), scalings(layout, adapter, t))
    return part


@dataclass(frozen=True, slots=True)
class _Lie:
    """How an adapter lies in memory: its dtypes, and whether its factors are contiguous and start at multiples of 16 bytes."""

    dtypes: frozenset[torch.dtype]
    contiguous: bool
    aligned: bool


_lies: WeakKeyDictionary[LoraAdapter, _Lie] = WeakKeyDictionary()


def _lie(adapter: LoraAdapter) -> _Lie:
    lie = _lies.get(adapter)
    if lie is None:
        factors = [factor for stack in adapter.stacks for factor in (stack.a_LRI, stack.b_LRO)]
        lie = _lies[adapter] = _Lie(
            frozenset(factor.dtype for factor in factors),
            all(factor.is_contiguous() for factor in factors),
            not any(factor.data_ptr() % 16 for factor in factors),
        )
    return lie


def uniform(adapters: Sequence[LoraAdapter]) -> list[LoraAdapter]:
    """The same adapters as tables want them: contiguous, of one dtype; those of different dtypes go through float32."""
    lies = [_lie(adapter) for adapter in adapters]
    dtypes = frozenset().union(*(lie.dtypes for lie in lies))
    if len(dtypes) == 1 and all(lie.contiguous for lie in lies):
        return list(adapters)
    (dtype,) = dtypes if len(dtypes) == 1 else (torch.float32,)
    return [
        LoraAdapter(
            StackedModules(
                [
                    Stack(s.names, s.a_LRI.to(dtype).contiguous(), s.b_LRO.to(dtype).contiguous(), s.scalings)
                    for s in adapter.stacks
                ]
            ),
            adapter.base_model,
        )
        for adapter in adapters
    ]


def aligned(adapters: Sequence[LoraAdapter]) -> bool:
    """Whether all factors start at multiples of 16 bytes."""
    return all(_lie(adapter).aligned for adapter in adapters)


class Stage:
    """All numbers that change from merge to merge, in one buffer on the GPU, filled by one copy from pinned memory.

    Attributes:
        coefficient_LT: float64 on the GPU.
    """

    def __init__(self, modules: int, adapters: int, device: torch.device) -> None:
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int64, (2, modules, adapters)), (torch.float64, (modules, adapters)),  # sources, both sides; coefficients
            (torch.int64, (modules,)), (torch.int32, (3, modules)),  # target of A: addresses, frame
            (torch.int64, (modules,)), (torch.int32, (3, modules)),  # target of B
        ]  # fmt: skip
        sizes = [dtype.itemsize * int(np.prod(shape)) for dtype, shape in shapes]
        starts = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes)])
        self._host = torch.zeros(int(starts[-1]), dtype=torch.uint8, pin_memory=True)
        self._device = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=device)
        spans = [(slice(start, start + size), *of) for start, size, of in zip(starts, sizes, shapes, strict=False)]
        self._fields = [self._host[span].view(dtype).view(shape).numpy() for span, dtype, shape in spans]
        self._views = [self._device[span].view(dtype).view(shape) for span, dtype, shape in spans]
        self.coefficient_LT = self._views[1]

    def fill(
        self, layout: PoolLayout, adapters: Sequence[LoraAdapter], terms: Sequence[Term], targets: Sequence[Target] = ()
    ) -> None:
        """Say where one merge's factors are, and send it on the current stream. The last copy must be over.

        Args:
            adapters: all of the merge, as `pool.brought` gives them.
        """
        for t, place in enumerate(layout.adapters):
            part = column(adapters[place], layout, t)
            self._fields[0][:, :, t] = part.address_2L
            self._fields[1][:, t] = part.scaling_L * weights(layout, terms[place])
        values = [value for target in targets for value in (target.address_L, target.frame_3L)]
        for field, value in zip(self._fields[2:], values, strict=False):
            field[:] = value
        self._device.copy_(self._host, non_blocking=True)

    def side_tables(self, layout: PoolLayout, dtype: torch.dtype, aligned: bool) -> tuple[SideTable, SideTable]:
        """The tables of both sides.

        Args:
            aligned: whether all factors start at multiples of 16 bytes.
        """
        device = self._device.device
        units = owner_of_unit(layout.ranks, device), _row_of_unit(layout.ranks, device)
        a, b = [
            SideTable(
                address_LT,
                constant(widths, device),
                widths,
                *units,
                layout.ranks,
                dtype,
                aligned and not any(width % 8 for width in widths),
            )
            for address_LT, widths in zip(self._views[0], (layout.inputs, layout.outputs), strict=True)
        ]
        return a, b

    def target_tables(
        self, layout: PoolLayout, rank: int, dtype: torch.dtype, aligned: tuple[bool, bool]
    ) -> tuple[TargetTable, TargetTable]:
        one_L = constant((1,) * len(layout.modules), self._device.device)
        place_a_L, frame_a_3L, place_b_L, frame_b_3L = self._views[2:]
        (stride_a_L, first_a_L, width_a_L), (stride_b_L, first_b_L, width_b_L) = frame_a_3L, frame_b_3L
        return (
            TargetTable(place_a_L, stride_a_L, one_L, first_a_L, width_a_L, layout.inputs, rank, dtype, False, aligned[0]),
            TargetTable(place_b_L, one_L, stride_b_L, first_b_L, width_b_L, layout.outputs, rank, dtype, True, aligned[1]),
        )


@cache  # constants: CUDA graphs read them where they lie
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on the GPU."""
    return torch.tensor(values, dtype=torch.int32).to(device)


@cache
def _row_of_unit(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(rank, dtype=torch.int32) for rank in ranks]).to(device)
