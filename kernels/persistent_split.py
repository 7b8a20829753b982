"""Backward recurrence, persistent, its reduction split over four programs, one for each gate.

A program so reads a quarter of dgates. dh of a unit is the sum over the gates of dgates @ W_hh. Program 4 * block + gate
multiplies one gate for the block's 64 units, keeps the part of its own 16 units and sends the other three to the programs
that own them. A word of 8 bytes holds a value and the number of its step, so that it too is its own flag. There is room for
the words of two steps: whoever sends those of a step has seen that its receivers are done with the one two steps later. Rows
that get no gradient from the step after are neither sent nor waited for.

With two tiles or more, the product of a turn comes before the cell of the turn before, whose parts had time to arrive.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    Place,
    along,
    barrier,
    begin,
    cell_layout,
    chunks,
    columns_layout,
    cube,
    k_of,
    load_weights,
    masks_at,
    mma_layout,
    operand_layout,
    own_values,
    parts_layout,
    row_layout,
    settle,
    source_at,
    step_of,
    turn_after,
    unit_layout,
)
from .persistent_backward import Own, initial_gradient, saved_at, step_backward
from .rows import runs_backwards


@gluon.constexpr_function
def owners(H):
    """Programs of a tile: four for 64 units, the last of them perhaps without any."""
    return -(-H // 64) * 4


@gluon.jit(do_not_specialize=["T", "B", "tiles", "first_r", "row_stride_t", "row_stride_b"])
def lstm_backward_split(
    buffers, sequences, T, B, tiles, first_r, row_stride_t, row_stride_b, CELL: gl.constexpr, CONFIG: gl.constexpr
):
    """Grid (owners(H), groups of tiles, recurrences first_r ..).

    tiles are those of a program: one if CONFIG.room is, else 2 .. CONFIG.room.
    """
    dtype: gl.constexpr = buffers.dgates_ptr.dtype.element_ty
    H: gl.constexpr = CONFIG.H
    WARPS: gl.constexpr = CONFIG.warps
    CHUNKS: gl.constexpr = chunks(H, CONFIG)
    A: gl.constexpr = operand_layout(0, WARPS)
    ROOM: gl.constexpr = CONFIG.room
    CELLS: gl.constexpr = cell_layout(WARPS, 16)
    TURNS: gl.constexpr = CONFIG.room > 1
    r = (first_r + gl.program_id(2)).to(gl.int64)
    first = gl.program_id(1) * (tiles * 8)
    place = Place(*sequences, T, B, row_stride_t, row_stride_b, r, first, runs_backwards(r, CONFIG.directions))
    me = gl.program_id(0)
    gate = me % 4
    n = gl.arange(0, 8, row_layout(WARPS, 16))
    u = gl.expand_dims(me * 16 + gl.arange(0, 16, unit_layout(WARPS, 16)), 1)
    k_rows = gl.arange(0, 8, along(operand_layout(1, WARPS), 2))
    box = buffers.box_ptr + place.r * (2 * owners(H) * 3 * 16) * B
    # before the weights, whose conversion would else share its memory and ask for a barrier in the loop
    parts = gl.allocate_shared_memory(gl.float32, [WARPS, 64, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    state = gl.allocate_shared_memory(gl.float32, [ROOM, 16, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    held, rest = gate_weights(buffers.w_hh_ptr + (place.r * 4 + gate) * (H * H), me // 4 * 64, gate, CONFIG)
    for tile in range(tiles):
        state.index(tile).store(initial_gradient(buffers, place, tile, n, u, CELLS, CONFIG))
    peepholes, seed = own_values(buffers, r, u, CONFIG)
    if CONFIG.zoneout is not None:
        beside = gl.allocate_shared_memory(gl.float32, [ROOM, 16, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        for tile in range(tiles):
            beside.index(tile).store(gl.zeros([16, 8], gl.float32, CELLS))

    s = gl.to_tensor(0) + T - 1
    tile = gl.to_tensor(0)
    s0 = s  # the turn whose cell comes next
    tile0 = tile
    mine0 = gl.zeros([16, 8], gl.float32, CELLS)
    saved = saved_at(buffers, place, s, tile, n, u, CELLS, CONFIG)
    begun = ()
    if CONFIG.ahead:
        begun = begin(gate_gradients_after(buffers, place, s, tile, gate, k_rows, CONFIG), dtype, H, CONFIG)
    barrier()
    for turn in range(T * tiles):
        dc = state.index(tile0).load(CELLS)  # so early, the barrier that it needs serves the parts as well
        passed = ()
        if CONFIG.zoneout is not None:
            passed = (beside.index(tile0).load(CELLS),)
        own = Own(peepholes, (), masks_at(seed, place, s0, tile0, n, u, CONFIG), passed)
        da = settle(begun, gate_gradients_after(buffers, place, s, tile, gate, k_rows, CONFIG), dtype, H, CONFIG)
        s1, tile1 = turn_after(s, tile, tiles, -1)
        if CONFIG.ahead:
            begun = begin(gate_gradients_after(buffers, place, s1, tile1, gate, k_rows, CONFIG), dtype, H, CONFIG)
        acc = gl.zeros([WARPS, 64, 8], gl.float32, mma_layout(WARPS))
        for q in gl.static_range(CHUNKS):
            if q < len(held):
                acc = mma_v2(held[q], da[q], acc, input_precision="tf32")
            else:
                acc = mma_v2(rest[0].index(q - len(held)).load(A), da[q], acc, input_precision="tf32")
        parts.store(acc)
        for j in gl.static_range(1, 4):
            value = gl.sum(parts.slice(16 * j, 16, dim=1).load(parts_layout(WARPS, 16)), axis=0)
            send(box, place, s, tile, n, (me // 4) * 4 + (gate + j) % 4, j - 1, value, CONFIG)
        mine = gl.sum(parts.slice(0, 16, dim=1).load(parts_layout(WARPS, 16)), axis=0)
        if TURNS:
            if turn > 0:
                dh = received(box, place, s0, tile0, n, me, mine0, CONFIG)
                step = step_of(place, s0, tile0, n)
                _, dc, passed = step_backward(buffers, place, step, s0, u, dh, dc, saved, own, CELL, None, CONFIG)
                state.index(tile0).store(dc)
                if CONFIG.zoneout is not None:
                    beside.index(tile0).store(passed[0])
                saved = saved_at(buffers, place, s, tile, n, u, CELLS, CONFIG)
            mine0 = mine
            s0 = s
            tile0 = tile
        else:
            dh = received(box, place, s, tile, n, me, mine, CONFIG)
            step = step_of(place, s, tile, n)
            _, dc, passed = step_backward(buffers, place, step, s, u, dh, dc, saved, own, CELL, None, CONFIG)
            state.index(tile0).store(dc)
            if CONFIG.zoneout is not None:
                beside.index(tile0).store(passed[0])
            saved = saved_at(buffers, place, s1, tile1, n, u, CELLS, CONFIG)
            s0 = s1
            tile0 = tile1
        s = s1
        tile = tile1
    if TURNS:
        dc = state.index(tile0).load(CELLS)
        passed = ()
        if CONFIG.zoneout is not None:
            passed = (beside.index(tile0).load(CELLS),)
        own = Own(peepholes, (), masks_at(seed, place, s0, tile0, n, u, CONFIG), passed)
        dh = received(box, place, s0, tile0, n, me, mine0, CONFIG)
        step_backward(buffers, place, step_of(place, s0, tile0, n), s0, u, dh, dc, saved, own, CELL, None, CONFIG)


@gluon.jit
def gate_weights(w_ptr, u0, gate, CONFIG: gl.constexpr):
    """One gate's columns of W_hh of units u0 .. u0 + 63, the program's own units first."""
    COLUMNS: gl.constexpr = columns_layout(CONFIG.warps, 64, w_ptr.dtype.element_ty)
    m = gl.arange(0, 64, along(COLUMNS, 1))
    unit = cube(u0 + (gate + m // 16) % 4 * 16 + m % 16, 1)
    k = cube(gl.arange(0, CONFIG.warps, along(COLUMNS, 0)) * 32, 0) + cube(k_of(gl.arange(0, 32, along(COLUMNS, 2))), 2)
    inside = (unit < CONFIG.H) & (k >= 0)
    return load_weights(w_ptr + unit + k * CONFIG.H, k, inside, CONFIG.H, 64, CONFIG.H, CONFIG)


@gluon.jit
def gate_gradients_after(buffers, place, s, tile, gate, n, CONFIG: gl.constexpr):
    """Where step s finds one gate of the dgates of the step after it."""
    step = step_of(place, s + 1, tile, n)
    rows = buffers.dgates_ptr + ((step.row * CONFIG.R + place.r) * 4 + gate) * CONFIG.H
    rows = gl.where(step.keep, rows, buffers.zeros_ptr + step.row * 0)
    return source_at(rows, buffers.zeros_ptr, step.keep, CONFIG.H, CONFIG)


@gluon.jit
def letters(place, s, b, to, sender, CONFIG: gl.constexpr):
    """Where the words of step s lie in the box, for batch rows b and the 16 units of program ``to``."""
    u = gl.expand_dims(gl.arange(0, 16, unit_layout(CONFIG.warps, 16)), 1)
    return ((s % 2 * owners(CONFIG.H) + to) * 3 + sender) * (place.B * 16) + gl.expand_dims(b, 0) * 16 + u


@gluon.jit
def send(box, place, s, tile, n, to, sender, value, CONFIG: gl.constexpr):
    """Send what program ``to`` needs for step s, in the rows that get a gradient from the step after."""
    step = step_of(place, s + 1, tile, n)
    word = (value.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF) | ((s + 1).to(gl.int64) << 32)
    at = letters(place, s, step.b, to, sender, CONFIG)
    gl.store(box + at, word, mask=gl.expand_dims(step.keep, 0) & (at >= 0))


@gluon.constexpr_function
def receive_code():
    """Load three words until the upper half of each is the tag; $8 is 0 where there is nothing to wait for."""
    return """{
.reg .pred p;
.reg .b32 a, b, c;
.reg .b64 x, y, z;
again:
ld.relaxed.gpu.global.b64 x, [$3];
ld.relaxed.gpu.global.b64 y, [$4];
ld.relaxed.gpu.global.b64 z, [$5];
mov.b64 {$0, a}, x;
mov.b64 {$1, b}, y;
mov.b64 {$2, c}, z;
setp.ne.b32 p, a, $6;
setp.ne.or.b32 p, b, $6, p;
setp.ne.or.b32 p, c, $6, p;
setp.ne.and.b32 p, $7, 0, p;
@p bra again;
}"""


@gluon.jit
def received(box, place, s, tile, n, me, own, CONFIG: gl.constexpr):
    """dh of step s: this program's part and the three others, once they are there; zero where none comes."""
    step = step_of(place, s + 1, tile, n)
    third = place.B * 16
    at = box + letters(place, s, step.b, me, 0, CONFIG)
    at = gl.where(gl.expand_dims(step.keep, 0), at, box + third * 0)  # in range where nothing is read
    words = ()
    for j in gl.static_range(3):
        words = words + ((at + j * third).to(gl.uint64, bitcast=True),)
    zero = gl.zeros([16, 8], gl.int32, cell_layout(CONFIG.warps, 16))
    d = gl.inline_asm_elementwise(
        receive_code(), "=&r,=&r,=&r,l,l,l,r,r", words + (zero + (s + 1), zero + gl.expand_dims(step.keep, 0).to(gl.int32)),
        dtype=(gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    d0 = d[0].to(gl.float32, bitcast=True)
    d1 = d[1].to(gl.float32, bitcast=True)
    d2 = d[2].to(gl.float32, bitcast=True)
    return gl.where(gl.expand_dims(step.keep, 0), (own + d0) + (d1 + d2), 0.0)
