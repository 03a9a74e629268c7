"""Triton kernels on the units of a side: read where they lie, all modules in one launch; cuda_sides.py launches them.

Shape suffixes as in pool.py; D is I or O, P parts of the modules' rows.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]  # Triton's own types
    address_ptr, width, owner_ptr, row_ptr, layer, n, units, adapters, SOURCE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Pointers to the rows of units n of a module."""
    owner = tl.load(owner_ptr + n, mask=n < units, other=0)
    row = tl.load(row_ptr + n, mask=n < units, other=0)
    pointer = tl.load(address_ptr + layer * adapters + owner).to(tl.pointer_type(SOURCE)) + row.to(tl.int64) * width
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator]
def _number(pointer, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A width or a place along D; a multiple of 8 where all are, so that loads may be wide."""
    number = tl.load(pointer)
    if ALIGNED:
        number = tl.multiple_of(number, 8)
    return number


@triton.jit
def exact_dot(x, y, total):  # type: ignore[no-untyped-def]
    """total + x y, for x in float32 and y in bfloat16: x as three bfloat16 terms that add up to it, so products are exact."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    total = tl.dot(low, y, total)
    total = tl.dot(middle, y, total)
    return tl.dot(high, y, total)


@triton.jit(do_not_specialize=["units", "adapters", "chunk", "parts", "pairs"])  # type: ignore[untyped-decorator]
def gram_of_parts(  # type: ignore[no-untyped-def]
    address_ptr, width_ptr, owner_ptr, row_ptr, part_ptr, pair_ptr, gram_ptr, peak_ptr, units, adapters, chunk, parts, pairs,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SYMMETRIC: tl.constexpr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """G_ij = Σ_d x_id x_jd over one part of D, for a pair of tiles on or over the diagonal, and peak_i = max_d |x_id|.

    Pointers:
        address, width, owner, row: SideTable; part (2, P), pair (2, pairs) int32: read.
        gram (P, N, N) float32: written; peak (L, N) float32, 0 before: raised.
    """
    part = tl.program_id(0).to(tl.int64)
    layer = tl.load(part_ptr + part).to(tl.int64)
    first = _number(part_ptr + parts + part, ALIGNED)
    i = tl.load(pair_ptr + tl.program_id(1))
    j = tl.load(pair_ptr + pairs + tl.program_id(1))
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    width = _number(width_ptr + layer, ALIGNED)
    x_row = _rows(address_ptr, width, owner_ptr, row_ptr, layer, rows, units, adapters, SOURCE, ALIGNED)
    y_row = _rows(address_ptr, width, owner_ptr, row_ptr, layer, columns, units, adapters, SOURCE, ALIGNED)
    total = tl.zeros((TILE, TILE), tl.float32)
    peak = tl.zeros((TILE,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, width), BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_row[:, None] + d[None, :], mask=(rows < units)[:, None] & (d < width)[None, :], other=0.0)
        if SYMMETRIC:
            y = x
        else:
            y = tl.load(y_row[:, None] + d[None, :], mask=(columns < units)[:, None] & (d < width)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 1))
    out = gram_ptr + (part * units + rows[:, None]) * units + columns[None, :]
    tl.store(out, total, mask=(rows < units)[:, None] & (columns < units)[None, :])
    if i == j:
        tl.atomic_max(peak_ptr + layer * units + rows, peak, mask=rows < units)


@triton.jit(do_not_specialize=["units"])  # type: ignore[untyped-decorator]
def sum_of_parts(gram_ptr, start_ptr, out_ptr, units, TILE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum over the parts of each module in float64, mirrored below the diagonal tiles. out (L, N, N) float64: written."""
    layer = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < units * units
    row, column = place // units, place % units
    below = row // TILE > column // TILE
    first = tl.load(start_ptr + layer)
    source = gram_ptr + first.to(tl.int64) * units * units + tl.where(below, column * units + row, place)
    total = tl.zeros((BLOCK,), tl.float64)
    for _ in range(first, tl.load(start_ptr + layer + 1)):
        total += tl.load(source, mask=inside, other=0.0).to(tl.float64)
        source += units * units
    tl.store(out_ptr + layer * units * units + place, total, mask=inside)


@triton.jit(do_not_specialize=["units", "adapters"])  # type: ignore[untyped-decorator]
def peak_sign(  # type: ignore[no-untyped-def]
    address_ptr, width_ptr, owner_ptr, row_ptr, sign_ptr, units, adapters,
    BLOCK: tl.constexpr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The sign of each unit's first entry of largest magnitude. sign (L, N) float64: written."""
    layer = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    width = _number(width_ptr + layer, ALIGNED)
    x_row = _rows(address_ptr, width, owner_ptr, row_ptr, layer, n, units, adapters, SOURCE, ALIGNED)
    peak = tl.full((BLOCK,), -1.0, tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        magnitude = tl.abs(tl.load(x_row + d, mask=d < width, other=0.0).to(tl.float32))
        where = tl.where(magnitude > peak, d, where)
        peak = tl.maximum(peak, magnitude)
    first = tl.min(tl.where(peak == tl.max(peak), where, width - 1))
    value = tl.load(x_row + first).to(tl.float32)
    tl.store(sign_ptr + layer * units + n, tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0)).to(tl.float64))


@triton.jit  # type: ignore[untyped-decorator]
def _put(  # type: ignore[no-untyped-def]
    y, place_ptr, stride_k_ptr, stride_d_ptr, layer, c, d, rank, window,
    RESULT: tl.constexpr, UNITS_FAST: tl.constexpr, ROOM_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store entries (c, d) of a module, turned around first where units lie next to each other.

    Stores are wide where Triton knows `rank` to be even enough; so kernels are specialised for it.
    """
    room = tl.load(place_ptr + layer).to(tl.pointer_type(RESULT))
    if ROOM_ALIGNED:
        room = tl.multiple_of(room, 16)
    y = y.to(RESULT)
    if UNITS_FAST:
        stride = _number(stride_d_ptr + layer, ROOM_ALIGNED)
        tl.store(room + d[:, None] * stride + c[None, :], tl.trans(y), mask=(d < window)[:, None] & (c < rank)[None, :])
    else:
        stride = _number(stride_k_ptr + layer, ROOM_ALIGNED)
        tl.store(room + c[:, None] * stride + d[None, :], y, mask=(c < rank)[:, None] & (d < window)[None, :])


@triton.jit(do_not_specialize=["units", "adapters"])  # type: ignore[untyped-decorator]
def keep(  # type: ignore[no-untyped-def]
    address_ptr, width_ptr, owner_ptr, row_ptr, scale_ptr, place_ptr, stride_k_ptr, stride_d_ptr, first_ptr, window_ptr,
    units, adapters, rank, TILE: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr,
    RESULT: tl.constexpr, UNITS_FAST: tl.constexpr, ROOM_ALIGNED: tl.constexpr,
):  # fmt: skip
    """y_nd = scale_n x_nd, and zeros from row N on.

    Pointers:
        address, width, owner, row: SideTable; scale (L, N) float32: read.
        place, strides, first, window: TargetTable; what it points to: written.
    """
    layer = tl.program_id(0).to(tl.int64)
    window = _number(window_ptr + layer, ROOM_ALIGNED)
    if tl.program_id(1) * BLOCK < window:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        c = tl.program_id(2) * TILE + tl.arange(0, TILE)
        first = _number(first_ptr + layer, ROOM_ALIGNED)
        width = _number(width_ptr + layer, ALIGNED)
        x_row = _rows(address_ptr, width, owner_ptr, row_ptr, layer, c, units, adapters, SOURCE, ALIGNED)
        x = tl.load(x_row[:, None] + (first + d)[None, :], mask=(c < units)[:, None] & (d < window)[None, :], other=0.0)
        scale = tl.load(scale_ptr + layer * units + c, mask=c < units, other=0.0)
        y = scale[:, None] * x.to(tl.float32)
        _put(y, place_ptr, stride_k_ptr, stride_d_ptr, layer, c, d, rank, window, RESULT, UNITS_FAST, ROOM_ALIGNED)


@triton.jit(do_not_specialize=["units", "adapters", "k"])  # type: ignore[untyped-decorator]
def mix(  # type: ignore[no-untyped-def]
    address_ptr, width_ptr, owner_ptr, row_ptr, t_ptr, scale_ptr, place_ptr, stride_k_ptr, stride_d_ptr, first_ptr, window_ptr,
    peak_ptr, units, adapters, k, rank, KP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    SOURCE: tl.constexpr, ALIGNED: tl.constexpr, RESULT: tl.constexpr, UNITS_FAST: tl.constexpr, ROOM_ALIGNED: tl.constexpr,
):  # fmt: skip
    """y_kd = s_k Σ_n t_kn x_nd, kept, with zeros from row K on; or, given a peak pointer, only its peak over d, s being 1.

    bfloat16 units meet T by exact_dot.

    Pointers:
        address, width, owner, row: SideTable; t (L, K, N) float64; scale (L, K) float64, or None for 1: read.
        peak: (L, K) float32: raised. Where it is None, place, strides, first, window: TargetTable; what it points to: written.
    """
    layer = tl.program_id(0).to(tl.int64)
    width = _number(width_ptr + layer, ALIGNED)
    if peak_ptr is None:
        window = _number(window_ptr + layer, ROOM_ALIGNED)
        first = _number(first_ptr + layer, ROOM_ALIGNED)
    else:
        window = width
        first = 0
    if tl.program_id(1) * BLOCK < window:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        c = tl.program_id(2) * KP + tl.arange(0, KP)
        total = tl.zeros((KP, BLOCK), tl.float32)
        for tile in range(0, tl.where(tl.program_id(2) * KP < k, units, 0), TILE):
            n = tile + tl.arange(0, TILE)
            x_row = _rows(address_ptr, width, owner_ptr, row_ptr, layer, n, units, adapters, SOURCE, ALIGNED)
            x = tl.load(x_row[:, None] + (first + d)[None, :], mask=(n < units)[:, None] & (d < window)[None, :], other=0.0)
            inside = (c < k)[:, None] & (n < units)[None, :]
            t = tl.load(t_ptr + (layer * k + c[:, None]) * units + n[None, :], mask=inside, other=0.0).to(tl.float32)
            total = exact_dot(t, x, total) if SPLIT else tl.dot(t, x.to(tl.float32), total, input_precision="ieee")
        if scale_ptr is not None:
            total *= tl.load(scale_ptr + layer * k + c, mask=c < k, other=0.0).to(tl.float32)[:, None]
        if peak_ptr is None:
            _put(total, place_ptr, stride_k_ptr, stride_d_ptr, layer, c, d, rank, window, RESULT, UNITS_FAST, ROOM_ALIGNED)
        else:
            tl.atomic_max(peak_ptr + layer * k + c, tl.max(tl.abs(total), 1), mask=c < k)
