"""Forward recurrence, persistent: one launch for the sequence, weights on chip, h passed on by the exchange of fragments.py.

One loop over (step, tile) pairs. While a program computes a pair it has begun to load the h of the next one and the input of
the next two; with a single tile it cannot begin, since what it would load is what it is about to compute. Cell states lie in
shared memory, fp32.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cell import zoned
from .fragments import (
    Place,
    along,
    barrier,
    begin,
    cell_layout,
    chunks,
    cube,
    exchangeable,
    k_of,
    load_weights,
    masks_at,
    mma_layout,
    operand_layout,
    own_values,
    parts_layout,
    row_layout,
    row_or_past_end,
    settle,
    source_at,
    step_of,
    turn_after,
    unit_layout,
)
from .rows import runs_backwards


@gluon.jit(do_not_specialize=["T", "B", "tiles", "first_r", "row_stride_t", "row_stride_b"])
def lstm_forward_fragments(
    buffers, sequences, T, B, tiles, first_r, row_stride_t, row_stride_b, CELL: gl.constexpr, CONFIG: gl.constexpr
):
    """Grid (H / units, groups of tiles, recurrences first_r ..); tiles are those of a program, at most CONFIG.room."""
    dtype: gl.constexpr = buffers.h_ptr.dtype.element_ty
    H: gl.constexpr = CONFIG.H
    WARPS: gl.constexpr = CONFIG.warps
    UNITS: gl.constexpr = CONFIG.units
    CHUNKS: gl.constexpr = chunks(H, CONFIG)
    A: gl.constexpr = operand_layout(0, WARPS)
    ROOM: gl.constexpr = CONFIG.room
    CELLS: gl.constexpr = cell_layout(WARPS, UNITS)
    r = (first_r + gl.program_id(2)).to(gl.int64)
    first = gl.program_id(1) * (tiles * 8)
    place = Place(*sequences, T, B, row_stride_t, row_stride_b, r, first, runs_backwards(r, CONFIG.directions))
    u0 = gl.program_id(0) * UNITS
    held, rest = forward_weights(buffers.w_hh_ptr + r * (4 * H * H), u0, CONFIG)
    n = gl.arange(0, 8, row_layout(WARPS, UNITS))
    u = gl.expand_dims(u0 + gl.arange(0, UNITS, unit_layout(WARPS, UNITS)), 1)
    k_rows = gl.arange(0, 8, along(operand_layout(1, WARPS), 2))
    parts = gl.allocate_shared_memory(gl.float32, [WARPS, 4 * UNITS, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    state = gl.allocate_shared_memory(gl.float32, [ROOM, UNITS, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for tile in range(tiles):
        state.index(tile).store(initial(buffers, place, gl.to_tensor(tile), n, u, CELLS, CONFIG))
    peepholes, seed = own_values(buffers, r, u, CONFIG)
    if CONFIG.zoneout is not None:
        shown = gl.allocate_shared_memory(dtype, [ROOM, UNITS, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        for tile in range(tiles):
            shown.index(tile).store(initial_h(buffers, place, gl.to_tensor(tile), n, u, CELLS, CONFIG))

    bias = ()
    if buffers.b_hh_ptr is not None:
        for g in gl.static_range(4):
            bias = bias + (gl.load(buffers.b_hh_ptr + (r * 4 + g) * H + u).to(gl.float32),)
    s = gl.to_tensor(0)
    tile = gl.to_tensor(0)
    s1, tile1 = turn_after(s, tile, tiles, 1)
    x = input_at(buffers.gates_ptr, place, s, tile, n, u, CONFIG)
    x1 = input_at(buffers.gates_ptr, place, s1, tile1, n, u, CONFIG)
    begun = ()
    if CONFIG.ahead:
        begun = begin(state_before(buffers, place, s, tile, k_rows, CONFIG), dtype, H, CONFIG)
    barrier()
    for _ in range(T * tiles):
        kept = masks_at(seed, place, s, tile, n, u, CONFIG)
        h = settle(begun, state_before(buffers, place, s, tile, k_rows, CONFIG), dtype, H, CONFIG)
        s1, tile1 = turn_after(s, tile, tiles, 1)
        s2, tile2 = turn_after(s1, tile1, tiles, 1)
        if CONFIG.ahead:
            begun = begin(state_before(buffers, place, s1, tile1, k_rows, CONFIG), dtype, H, CONFIG)
        acc = gl.zeros([WARPS, 4 * UNITS, 8], gl.float32, mma_layout(WARPS))
        for q in gl.static_range(CHUNKS):
            if q < len(held):
                acc = mma_v2(held[q], h[q], acc, input_precision="tf32")
            else:
                acc = mma_v2(rest[0].index(q - len(held)).load(A), h[q], acc, input_precision="tf32")
        parts.store(acc)
        recurrent = ()
        given = ()
        for g in gl.static_range(4):
            of_gate = parts.slice(g * UNITS, UNITS, dim=1).load(parts_layout(WARPS, UNITS))
            recurrent = recurrent + (gl.sum(of_gate, axis=0),)
            if buffers.b_hh_ptr is None:
                given = given + (x[g].to(gl.float32),)
            else:
                given = given + (x[g].to(gl.float32) + bias[g],)
        step = step_of(place, s, tile, n)
        own = state.index(tile)
        c = own.load(CELLS)
        if sequences.resets_ptr is not None:
            c = gl.where(gl.expand_dims(step.keep, 0) & (u < CONFIG.H), c, 0.0)
        c_prev = c
        activated, c, h_new = CELL(recurrent, given, c, peepholes, (), None, None)
        if CONFIG.zoneout is not None:
            h_prev = shown.index(tile).load(CELLS).to(gl.float32)
            if sequences.resets_ptr is not None:
                h_prev = gl.where(gl.expand_dims(step.keep, 0) & (u < CONFIG.H), h_prev, 0.0)
            h_new = zoned(h_prev, h_new, kept, 0, CONFIG.zoneout.h)
            c = zoned(c_prev, c, kept, 1, CONFIG.zoneout.c)
        save(buffers, place, step, s, u, activated, c, h_new, CONFIG)
        own.store(c)  # last, since a barrier comes before it
        if CONFIG.zoneout is not None:
            shown.index(tile).store(h_new.to(dtype))
        x = x1
        x1 = input_at(buffers.gates_ptr, place, s2, tile2, n, u, CONFIG)
        s = s1
        tile = tile1


@gluon.jit
def forward_weights(w_ptr, u0, CONFIG: gl.constexpr):
    """The rows of W_hh of units u0 .., gate after gate."""
    A: gl.constexpr = operand_layout(0, CONFIG.warps)
    m = gl.arange(0, 4 * CONFIG.units, along(A, 1))
    row = cube((m // CONFIG.units) * CONFIG.H + u0 + m % CONFIG.units, 1)
    k = cube(gl.arange(0, CONFIG.warps, along(A, 0)) * 32, 0) + cube(k_of(gl.arange(0, 32, along(A, 2))), 2)
    inside = row < 4 * CONFIG.H
    return load_weights(w_ptr + row * CONFIG.H + k, k, inside & (k >= 0), 1, 4 * CONFIG.units, CONFIG.H, CONFIG)


@gluon.jit
def initial(buffers, place, tile, n, u, CELLS: gl.constexpr, CONFIG: gl.constexpr):
    """The cell states of a tile before its first step. A row that has no step keeps its states: they are stored here."""
    UNITS: gl.constexpr = CONFIG.units
    b = place.first + tile * 8 + n
    at = gl.expand_dims((place.r * place.B + b) * CONFIG.H, 0) + u  # (R, B, H)
    mask = gl.expand_dims(b < place.B, 0) & (u < CONFIG.H)
    c = gl.zeros([UNITS, 8], gl.float32, CELLS)
    if buffers.c0_ptr is not None:
        c = gl.load(buffers.c0_ptr + at, mask=mask, other=0.0).to(gl.float32)
    if place.lengths_ptr is not None:
        without = mask & gl.expand_dims(gl.load(place.lengths_ptr + b, mask=b < place.B, other=1) == 0, 0)
        gl.store(buffers.cn_ptr + at, c.to(buffers.cn_ptr.dtype.element_ty), mask=without)
        gl.store(buffers.hn_ptr + at, initial_h(buffers, place, tile, n, u, CELLS, CONFIG), mask=without)
    return c


@gluon.jit
def initial_h(buffers, place, tile, n, u, CELLS: gl.constexpr, CONFIG: gl.constexpr):
    """The hidden states of a tile before its first step."""
    UNITS: gl.constexpr = CONFIG.units
    b = place.first + tile * 8 + n
    h = gl.zeros([UNITS, 8], buffers.h_ptr.dtype.element_ty, CELLS)
    if buffers.h0_ptr is not None:
        at = gl.expand_dims((place.r * place.B + b) * CONFIG.H, 0) + u
        h = gl.load(buffers.h0_ptr + at, mask=gl.expand_dims(b < place.B, 0) & (u < CONFIG.H), other=0.0)
    return h


@gluon.jit
def state_before(buffers, place, s, tile, n, CONFIG: gl.constexpr):
    """Where step s finds the h of the step before it: at its data row, or in h0, or at zeros."""
    step = step_of(place, s, tile, n)
    start = buffers.zeros_ptr + step.before * 0
    if buffers.h0_ptr is not None:
        start = buffers.h0_ptr + (place.r * place.B + step.b) * CONFIG.H
    start = gl.where(step.keep, start, buffers.zeros_ptr + step.before * 0)
    wait = step.keep & (s > 0)
    rows = gl.where(wait, buffers.h_ptr + (step.before * CONFIG.R + place.r) * CONFIG.H, start)
    return source_at(rows, buffers.zeros_ptr, wait, CONFIG.H, CONFIG)


@gluon.jit
def input_at(gates_ptr, place, s, tile, n, u, CONFIG: gl.constexpr):
    """What the input adds to the pre-activations of a turn; beyond the last step, nothing."""
    step = step_of(place, s, tile, n)
    at = gates_ptr + gl.expand_dims((step.row * CONFIG.R + place.r) * (4 * CONFIG.H), 0) + u
    mask = gl.expand_dims(step.has, 0) & (u < CONFIG.H)
    x = ()
    for g in gl.static_range(4):
        x = x + (gl.load(at + g * CONFIG.H, mask=mask, other=0.0),)
    return x


@gluon.jit
def save(buffers, place, step, s, u, activated, c, h, CONFIG: gl.constexpr):
    """Store the results of a turn; first of all h, which others wait for."""
    dtype: gl.constexpr = buffers.h_ptr.dtype.element_ty
    has = gl.expand_dims(step.has, 0) & (u < CONFIG.H)
    h = exchangeable(h, dtype)
    at = gl.expand_dims((step.row * CONFIG.R + place.r) * CONFIG.H, 0) + u
    if place.lengths_ptr is not None and place.starts_ptr is None:
        row = row_or_past_end(place, step, s)
        everywhere = gl.expand_dims((row * CONFIG.R + place.r) * CONFIG.H, 0) + u
        gl.store(
            buffers.h_ptr + everywhere,
            gl.where(has, h, 0.0).to(dtype),
            mask=gl.expand_dims(step.b < place.B, 0) & (u < CONFIG.H),
        )
    else:
        gl.store(buffers.h_ptr + at, h, mask=has)
    last = has & gl.expand_dims(s == step.lengths - 1, 0)
    end = gl.expand_dims((place.r * place.B + step.b) * CONFIG.H, 0) + u
    gl.store(buffers.hn_ptr + end, h, mask=last)
    gl.store(buffers.cn_ptr + end, c.to(dtype), mask=last)
    if buffers.c_ptr is not None:
        gl.store(buffers.c_ptr + at, c.to(dtype), mask=has)
        gate = buffers.gates_ptr + gl.expand_dims((step.row * CONFIG.R + place.r) * (4 * CONFIG.H), 0) + u
        for g in gl.static_range(4):
            gl.store(gate + g * CONFIG.H, activated[g].to(dtype), mask=has)
