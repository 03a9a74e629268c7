"""Merging entry by entry on the GPU, in Triton: what elementwise.py says, for all modules in one or two launches.

Factors are read where they lie, through tables of addresses. Nothing waits for the host, and once the constants of a
layout are cached nothing comes from it, so that a CUDA graph can capture it all.
Shape suffixes as in pool.py; D is I or O.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from merging.cuda_tables import SideTable, TargetTable, constant
from merging.elementwise import Blend, Largest, Random, draw_limit


def blend_rows(side: SideTable, blend: Blend, weight_LT: Tensor, key_LT: Tensor, target: TargetTable) -> None:
    """Write the blend of one side's factors to its target.

    Args:
        side: factors of equal rank R, at most the target's.
        weight_LT: float32, contiguous, on the GPU.
        key_LT: int64, contiguous, on the GPU: the seeds of `Blend`.
        target: only its window is written; a sparsifier looks at all of D nevertheless.
    """
    (layers, adapters), device = side.address_LT.shape, side.address_LT.device
    rank, sparsifier = side.ranks[0], blend.sparsifier
    threshold_LT = None
    if isinstance(sparsifier, Largest) and sparsifier.density < 1:
        threshold_LT = torch.empty(layers, adapters, dtype=torch.int32, device=device)
        _thresholds[(layers * adapters,)](
            side.address_LT, side.width_L, constant(_kept(side.widths, rank, sparsifier.density), device), threshold_LT,
            rank, layers, adapters, **side.constants, BLOCK=16384, num_warps=16, num_stages=1,
        )  # fmt: skip
    draws = isinstance(sparsifier, Random) and sparsifier.density < 1
    density, seed = (sparsifier.density, sparsifier.seed) if isinstance(sparsifier, Random) else (1.0, 0)
    block = 64
    _blend[(triton.cdiv(max(side.widths), block), layers, triton.cdiv(target.rank, 16))](
        side.address_LT, side.width_L, threshold_LT, weight_LT, key_LT if draws else None,
        target.address_L, target.stride_k_L, target.stride_d_L, target.first_L, target.width_L,
        rank, target.rank, adapters, density, draw_limit(density), seed, **side.constants, **target.constants,
        MAJORITY=blend.majority, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip


@cache
def _kept(widths: tuple[int, ...], rank: int, density: float) -> tuple[int, ...]:
    """The modules from the widest to the narrowest; then how many entries of each module's factors to keep."""
    by_width = sorted(range(len(widths)), key=lambda module: -widths[module])
    return (*by_width, *(int(density * rank * width) for width in widths))


@triton.jit(do_not_specialize=["rank", "layers", "adapters"])  # type: ignore[untyped-decorator]
def _thresholds(  # type: ignore[no-untyped-def]  # Triton's own types
    address_ptr, width_ptr, kept_ptr, threshold_ptr, rank, layers, adapters,
    SOURCE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest of the ⌊density · R D⌋ largest magnitudes of a factor, as `_magnitude` has it.

    Radix selection from the highest bits down, 5 at a time: count the magnitudes in 32 bins above the bound found so far
    (those beyond fall into the outer bins), and raise the bound to the last bin from which up enough of them lie.
    One program a factor, so that most readings but the first come from cache; the widest start first.

    Pointers:
        address (L, T) int64, width (L) int32, kept (2, L) int32: read; see _kept().
        threshold (L, T) int32: written.
    """
    module = tl.load(kept_ptr + tl.program_id(0) // adapters)
    pair = module * adapters + tl.program_id(0) % adapters
    count = rank * tl.load(width_ptr + module)
    kept = tl.load(kept_ptr + layers + module)
    x_ptr = tl.load(address_ptr + pair).to(tl.pointer_type(SOURCE))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        count = tl.multiple_of(count, 8)
    bound = 0
    for step in range((SOURCE.primitive_bitwidth + 3) // 5):
        shift = (SOURCE.primitive_bitwidth + 3) // 5 * 5 - 5 - 5 * step
        histogram = tl.zeros((32,), tl.int32)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            above = _magnitude(tl.load(x_ptr + place, mask=place < count, other=0.0)) - bound
            histogram += tl.histogram(tl.minimum(tl.maximum(above >> shift, 0), 31), 32)
        digit = tl.sum((tl.cumsum(histogram, 0, reverse=True) >= kept).to(tl.int32)) - 1
        bound += digit << shift
    tl.store(threshold_ptr + pair, tl.where(kept > 0, bound, 0x7FFFFFFF))


@triton.jit(do_not_specialize=["rank", "adapters", "limit", "seed"])  # type: ignore[untyped-decorator]
def _blend(  # type: ignore[no-untyped-def]  # Triton's own types
    address_ptr, width_ptr, threshold_ptr, weight_ptr, key_ptr,
    target_ptr, stride_k_ptr, stride_d_ptr, first_ptr, window_ptr,
    rank, rows, adapters, density, limit, seed,
    SOURCE: tl.constexpr, ALIGNED: tl.constexpr, RESULT: tl.constexpr, UNITS_FAST: tl.constexpr, ROOM_ALIGNED: tl.constexpr,
    MAJORITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = Σ_t w_t x_t, or the mean of w_t x_t over the t where x_t has the elected sign.

    Pointers:
        address (L, T) int64, width (L) int32, weight (L, T) float32: read.
        threshold (L, T) int32: read; None keeps all. key (L, T) int64: read; None draws nothing.
        target, stride_k, stride_d, first, window (L): the target's table, read; its entries: written.
    """
    module = tl.program_id(1)
    width = tl.load(width_ptr + module)
    first = tl.load(first_ptr + module)
    window = tl.load(window_ptr + module)
    start = tl.program_id(0) * BLOCK
    if (start < first + window) & (start + BLOCK > first):
        if ALIGNED:
            width = tl.multiple_of(width, 8)
        r = tl.program_id(2) * 16 + tl.arange(0, 16)
        d = start + tl.arange(0, BLOCK)
        place = r[:, None] * width + d[None, :]
        inside = (r < rank)[:, None] & (d < width)[None, :]
        total = tl.zeros((16, BLOCK), tl.float32)  # of the positive entries, where signs are elected
        if MAJORITY is not None:
            vote = tl.zeros((16, BLOCK), tl.float32)
            negative = tl.zeros((16, BLOCK), tl.float32)
            ayes = tl.zeros((16, BLOCK), tl.float32)
            noes = tl.zeros((16, BLOCK), tl.float32)
        for t in range(tl.where(tl.program_id(2) * 16 < rank, adapters, 0)):
            pair = module * adapters + t
            x_ptr = tl.load(address_ptr + pair).to(tl.pointer_type(SOURCE))
            if ALIGNED:
                x_ptr = tl.multiple_of(x_ptr, 16)
            stored = tl.load(x_ptr + place, mask=inside, other=0.0)
            x = stored.to(tl.float32)
            if threshold_ptr is not None:
                x = tl.where(_magnitude(stored) >= tl.load(threshold_ptr + pair), x, 0.0)
            if key_ptr is not None:
                key = _hash((tl.load(key_ptr + pair) ^ seed).to(tl.uint32))
                drawn = (_hash(place.to(tl.uint32) ^ key) & 0x7FFFFFFF) < limit
                x = tl.where(drawn, tl.div_rn(x, density), 0.0)
            weight = tl.load(weight_ptr + pair)
            if MAJORITY is None:
                total += weight * x
            else:
                aye = tl.where(x > 0, 1.0, 0.0)
                no = tl.where(x < 0, 1.0, 0.0)
                vote += x if MAJORITY == "total" else aye - no
                total += weight * tl.maximum(x, 0.0)
                negative += weight * tl.minimum(x, 0.0)
                ayes += aye
                noes += no
        if MAJORITY is not None:
            total = tl.div_rn(tl.where(vote >= 0, total, negative), tl.maximum(tl.where(vote >= 0, ayes, noes), 1.0))
        merged = total.to(RESULT)
        y_ptr = tl.load(target_ptr + module).to(tl.pointer_type(RESULT))
        if ROOM_ALIGNED:
            y_ptr = tl.multiple_of(y_ptr, 16)
            first = tl.multiple_of(first, 8)
            window = tl.multiple_of(window, 8)
        d -= first
        kept = (r < rows)[:, None] & ((d >= 0) & (d < window))[None, :]
        if UNITS_FAST:
            stride_d = tl.load(stride_d_ptr + module)
            tl.store(y_ptr + d[:, None] * stride_d + r[None, :], tl.trans(merged), mask=tl.trans(kept))
        else:
            stride_k = tl.load(stride_k_ptr + module)
            tl.store(y_ptr + r[:, None] * stride_k + d[None, :], merged, mask=kept)


@triton.jit
def _magnitude(x):  # type: ignore[no-untyped-def]  # Triton's own types
    """The bits of |x| as an int32: they order as |x| does."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _hash(x):  # type: ignore[no-untyped-def]  # Triton's own types
    """`elementwise._hash`, of uint32 numbers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
