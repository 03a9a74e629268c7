"""Plans: what the GPU has to do for all merges of one layout by one method, as a CUDA graph.

A merge is some hundred small launches around a few large ones, and would take longer to launch than to compute. The
first merge of a plan is launched as it is, which compiles its kernels; the second is captured; from then on a merge is
one copy of addresses and weights, and one launch. A few tens of microseconds of the caller's thread, which matters
most where another thread of the process is busy serving.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import torch

from merging.adapter import LoraAdapter
from merging.assembly import assemble
from merging.cuda_graph import Graph
from merging.cuda_sides import CudaSide
from merging.cuda_tables import Stage, aligned
from merging.kmeans import NotCapturable
from merging.layout import PoolLayout
from merging.pool import Pool
from merging.room import Target
from merging.spec import MergeSpec
from merging.term import Term

_REMEMBERED = 64  # plans; each holds tables of some ten kilobytes and a graph

_plans: OrderedDict[tuple[Any, ...], "_Plan"] = OrderedDict()
_lock = Lock()


def run_plan(
    layout: PoolLayout, adapters: Sequence[LoraAdapter], terms: Sequence[Term], spec: MergeSpec, a: Target, b: Target
) -> None:
    """Queue the merge of one pool on the current stream, of adapters as `brought` gives them.

    Merges follow one another on the device, whichever threads and streams they come from: their small problems share memory.
    """
    factor = adapters[0].stacks[0].a_LRI
    form = _Form(factor.device, factor.dtype, aligned(adapters), a.rank, a.dtype, (a.aligned, b.aligned))
    key = layout, spec.method.name, spec.options, form
    with _lock:
        if key not in _plans:
            _plans[key] = _Plan(layout, spec, form)
            if len(_plans) > _REMEMBERED:
                _shared(form.device).done.synchronize()  # what is left out may be running
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        _plans[key](adapters, terms, a, b)


def pool_on_gpu(layout: PoolLayout, adapters: Sequence[LoraAdapter], terms: Sequence[Term]) -> Pool:
    """A pool to be looked at, of adapters as `brought` gives them, with no room for a merge."""
    factor = adapters[0].stacks[0].a_LRI
    stage = Stage(len(layout.modules), len(layout.adapters), factor.device)
    stage.fill(layout, adapters, terms)
    a, b = stage.side_tables(layout, factor.dtype, aligned(adapters))
    return Pool(layout.modules, layout.adapters, layout.ranks, stage.coefficient_LT, CudaSide(a), CudaSide(b))


class _Form(NamedTuple):
    """What a plan is made for, beside layout and method: the sources' and the rooms' device, dtype and alignment."""

    device: torch.device
    dtype: torch.dtype
    aligned: bool
    room_rank: int
    room_dtype: torch.dtype
    rooms_aligned: tuple[bool, bool]


class _Shared:
    """What all plans of a device share: memory for what lies between units and result, and the end of the last merge."""

    def __init__(self) -> None:
        self.memory = torch.cuda.MemPool()
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]


@cache
def _shared(device: torch.device) -> _Shared:
    return _Shared()


class _Plan:
    """One plan; not for two threads at a time."""

    def __init__(self, layout: PoolLayout, spec: MergeSpec, form: _Form) -> None:
        self._layout, self._method, self._options, self._device = layout, spec.method, spec.options, form.device
        self._stage = Stage(len(layout.modules), len(layout.adapters), form.device)
        tables = self._stage.side_tables(layout, form.dtype, form.aligned)
        targets = self._stage.target_tables(layout, form.room_rank, form.room_dtype, form.rooms_aligned)
        self._sides = [CudaSide(table, target) for table, target in zip(tables, targets, strict=True)]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._runs = 0
        self._graph: Graph | None = None

    def __call__(self, adapters: Sequence[LoraAdapter], terms: Sequence[Term], a: Target, b: Target) -> None:
        stream, shared = torch.cuda.current_stream(self._device), _shared(self._device)
        stream.wait_event(shared.done)
        self._copied.synchronize()
        self._stage.fill(self._layout, adapters, terms, (a, b))
        self._copied.record(stream)
        if self._runs == 1:
            with contextlib.suppress(NotCapturable):
                self._graph = Graph(self._work, shared.memory)
        self._runs += 1
        if self._graph is None:
            self._work()
        else:
            self._graph.launch(stream)
        shared.done.record(stream)

    def _work(self) -> None:
        a, b = self._sides
        pool = Pool(self._layout.modules, self._layout.adapters, self._layout.ranks, self._stage.coefficient_LT, a, b)
        assemble(pool, self._method.assemble(pool, self._options))
