"""Forward and backward recurrence of few hidden units: a program owns all of them for 8 batch rows, and waits for nobody.

All weights are in registers, a warp has 16 units of each gate, and states pass through shared memory from step to step. Half
precision, H up to 128.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cell import Norm, zoned
from .fragments import Place, barrier, masks_at, own_values, step_of, unit_values
from .persistent_backward import Own, initial_gradient, saved_at, step_backward
from .persistent_forward import initial, input_at, save
from .rows import runs_backwards


@gluon.constexpr_function
def units_layout(warps):
    """(units, 8) of products and of the cell."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def local_operand(operand, warps):
    return gl.DotOperandLayout(operand, units_layout(warps), 2)


@gluon.constexpr_function
def square_layout(warps, axis):
    """(units, units) of weights, 16 bytes along the axis on which they are neighbours in memory."""
    order = [0, 1] if axis == 0 else [1, 0]
    return gl.BlockedLayout([8, 1] if axis == 0 else [1, 8], [2, 16] if axis == 0 else [16, 2], [1, warps], order)


@gluon.jit
def local_weights(w_ptr, TRANSPOSED: gl.constexpr, CONFIG: gl.constexpr):
    """(units, units) of each gate as operands A, zero beyond H."""
    AXIS: gl.constexpr = 0 if TRANSPOSED else 1
    LAYOUT: gl.constexpr = square_layout(CONFIG.warps, AXIS)
    m = gl.expand_dims(gl.arange(0, CONFIG.units, gl.SliceLayout(1, LAYOUT)), 1)
    k = gl.expand_dims(gl.arange(0, CONFIG.units, gl.SliceLayout(0, LAYOUT)), 0)
    if TRANSPOSED:
        at = k * CONFIG.H + m
    else:
        at = m * CONFIG.H + k
    weights = ()
    for g in gl.static_range(4):
        w = gl.load(w_ptr + g * CONFIG.H * CONFIG.H + at, mask=(m < CONFIG.H) & (k < CONFIG.H), other=0.0)
        weights = weights + (gl.convert_layout(w, local_operand(0, CONFIG.warps)),)
    return weights


@gluon.constexpr_function
def sums_layout(warps):
    """(warps, 8): a thread has the parts of all warps, for the rows of its elements in units_layout."""
    of_warps = [[1 << k, 0] for k in range(warps.bit_length() - 1)]
    rows = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], *of_warps], rows, [[0, 0]] * len(of_warps), [], [warps, 8])


@gluon.jit
def rooms_of(SUMS: gl.constexpr, CONFIG: gl.constexpr):
    """Where over_units gives so many sums at once; two rooms, of which one is free while all have yet to read the other."""
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rooms = ()
    if CONFIG.norm is not None:
        for _ in gl.static_range(2):
            room = ()
            for _ in gl.static_range(SUMS):
                room = room + (gl.allocate_shared_memory(gl.float32, [CONFIG.warps, 8], SHARED),)
            rooms = rooms + (room,)
    return rooms


@gluon.jit
def norm_of(buffers, r, u, rooms, CONFIG: gl.constexpr):
    """A program's Norm, () without. In each step anew, since registers are too few to keep it."""
    norm = ()
    if CONFIG.norm is not None:
        FIRST: gl.constexpr = CONFIG.norm.first
        norm = Norm(unit_values(buffers, r, u, FIRST, FIRST + 6, CONFIG), u < CONFIG.H, rooms)
    return norm


@gluon.jit
def over_units(values, room):
    """For each of some (units, 8) the sum over its units, (1, 8), at one barrier for all."""
    WARPS: gl.constexpr = room[0].shape[0]
    for k in gl.static_range(len(values)):
        room[k].store(gl.sum(values[k].reshape([WARPS, 16, 8]), axis=1))
    sums = ()
    for k in gl.static_range(len(values)):
        total = gl.sum(room[k].load(sums_layout(WARPS)), axis=0)
        sums = sums + (gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(0, units_layout(WARPS))), 0),)
    return sums


@gluon.jit(do_not_specialize=["T", "B", "tiles", "first_r", "row_stride_t", "row_stride_b"])
def lstm_forward_local(
    buffers, sequences, T, B, tiles, first_r, row_stride_t, row_stride_b, CELL: gl.constexpr, CONFIG: gl.constexpr
):
    """Grid (1, tiles of 8 rows, recurrences first_r ..), tiles is 1; CONFIG.units is a power of two, 16 for each warp."""
    dtype: gl.constexpr = buffers.h_ptr.dtype.element_ty
    UNITS: gl.constexpr = CONFIG.units
    CELLS: gl.constexpr = units_layout(CONFIG.warps)
    r = (first_r + gl.program_id(2)).to(gl.int64)
    first = gl.program_id(1) * (tiles * 8)
    place = Place(*sequences, T, B, row_stride_t, row_stride_b, r, first, runs_backwards(r, CONFIG.directions))
    n = gl.arange(0, 8, gl.SliceLayout(0, CELLS))
    u = gl.expand_dims(gl.arange(0, UNITS, gl.SliceLayout(1, CELLS)), 1)
    # two steps' states, a row after the other, as the product reads them
    states = gl.allocate_shared_memory(dtype, [2, 8, UNITS], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    weights = local_weights(buffers.w_hh_ptr + place.r * (4 * CONFIG.H * CONFIG.H), False, CONFIG)
    tile = gl.to_tensor(0)
    c = initial(buffers, place, tile, n, u, CELLS, CONFIG)
    h = gl.zeros([UNITS, 8], dtype, CELLS)
    step = step_of(place, tile, tile, n)
    if buffers.h0_ptr is not None:
        at = gl.expand_dims((place.r * B + step.b) * CONFIG.H, 0) + u
        h = gl.load(buffers.h0_ptr + at, mask=gl.expand_dims(step.keep, 0) & (u < CONFIG.H), other=0.0)
    states.index(0).permute([1, 0]).store(h)
    bias = ()
    if buffers.b_hh_ptr is not None:
        for g in gl.static_range(4):
            at = buffers.b_hh_ptr + (place.r * 4 + g) * CONFIG.H + u
            bias = bias + (gl.load(at, mask=u < CONFIG.H, other=0.0).to(gl.float32),)
    peepholes, seed = own_values(buffers, r, u, CONFIG)
    rooms = rooms_of(1, CONFIG)
    NORM: gl.constexpr = CONFIG.norm
    x = input_at(buffers.gates_ptr, place, tile, tile, n, u, CONFIG)
    x1 = input_at(buffers.gates_ptr, place, tile + 1, tile, n, u, CONFIG)
    barrier()
    for turn in range(T):
        s = gl.to_tensor(turn)
        kept = masks_at(seed, place, s, tile, n, u, CONFIG)
        norm = norm_of(buffers, r, u, rooms, CONFIG)
        before = states.index(s % 2).permute([1, 0]).load(local_operand(1, CONFIG.warps))
        recurrent = ()
        given = ()
        for g in gl.static_range(4):
            recurrent = recurrent + (mma_v2(weights[g], before, gl.zeros([UNITS, 8], gl.float32, CELLS)),)
            if buffers.b_hh_ptr is None:
                given = given + (x[g].to(gl.float32),)
            else:
                given = given + (x[g].to(gl.float32) + bias[g],)
        step = step_of(place, s, tile, n)
        if sequences.resets_ptr is not None:
            c = gl.where(gl.expand_dims(step.keep, 0) & (u < CONFIG.H), c, 0.0)
        c_prev = c
        activated, c, h_new = CELL(recurrent, given, c, peepholes, norm, NORM, over_units)
        if CONFIG.zoneout is not None:
            h_new = zoned(h.to(gl.float32), h_new, kept, 0, CONFIG.zoneout.h)
            c = zoned(c_prev, c, kept, 1, CONFIG.zoneout.c)
        keep = step_of(place, s + 1, tile, n).keep
        after = gl.where(gl.expand_dims(keep, 0) & (u < CONFIG.H), h_new.to(dtype), 0.0).to(dtype)
        states.index((s + 1) % 2).permute([1, 0]).store(after)
        if CONFIG.zoneout is not None:
            h = after
        save(buffers, place, step, s, u, activated, c, h_new, CONFIG)
        x = x1
        x1 = input_at(buffers.gates_ptr, place, s + 2, tile, n, u, CONFIG)


@gluon.jit(do_not_specialize=["T", "B", "tiles", "first_r", "row_stride_t", "row_stride_b"])
def lstm_backward_local(
    buffers, sequences, T, B, tiles, first_r, row_stride_t, row_stride_b, CELL: gl.constexpr, CONFIG: gl.constexpr
):
    """Grid (1, tiles of 8 rows, recurrences first_r ..), tiles is 1; CONFIG.units is a power of two, 16 for each warp."""
    dtype: gl.constexpr = buffers.dgates_ptr.dtype.element_ty
    UNITS: gl.constexpr = CONFIG.units
    CELLS: gl.constexpr = units_layout(CONFIG.warps)
    r = (first_r + gl.program_id(2)).to(gl.int64)
    first = gl.program_id(1) * (tiles * 8)
    place = Place(*sequences, T, B, row_stride_t, row_stride_b, r, first, runs_backwards(r, CONFIG.directions))
    n = gl.arange(0, 8, gl.SliceLayout(0, CELLS))
    u = gl.expand_dims(gl.arange(0, UNITS, gl.SliceLayout(1, CELLS)), 1)
    gradients = ()
    for _ in gl.static_range(4):  # for each gate two steps' dgates
        gradients = gradients + (gl.allocate_shared_memory(dtype, [2, 8, UNITS], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])),)
    weights = local_weights(buffers.w_hh_ptr + place.r * (4 * CONFIG.H * CONFIG.H), True, CONFIG)
    tile = gl.to_tensor(0)
    dc = initial_gradient(buffers, place, tile, n, u, CELLS, CONFIG)
    for g in gl.static_range(4):
        gradients[g].index(0).permute([1, 0]).store(gl.zeros([UNITS, 8], dtype, CELLS))
    saved = saved_at(buffers, place, tile + T - 1, tile, n, u, CELLS, CONFIG)
    peepholes, seed = own_values(buffers, r, u, CONFIG)
    rooms = rooms_of(2, CONFIG)
    passed = ()
    if CONFIG.zoneout is not None:
        passed = (gl.zeros([UNITS, 8], gl.float32, CELLS),)
    barrier()
    for turn in range(T):
        s = tile + T - 1 - turn
        norm = norm_of(buffers, r, u, rooms, CONFIG)
        dh = gl.zeros([UNITS, 8], gl.float32, CELLS)
        for g in gl.static_range(4):
            after = gradients[g].index(turn % 2).permute([1, 0]).load(local_operand(1, CONFIG.warps))
            dh = mma_v2(weights[g], after, dh)
        step = step_of(place, s, tile, n)
        keep = gl.expand_dims(step.keep, 0) & (u < CONFIG.H)
        own = Own(peepholes, norm, masks_at(seed, place, s, tile, n, u, CONFIG), passed)
        da, dc, passed = step_backward(buffers, place, step, s, u, dh, dc, saved, own, CELL, over_units, CONFIG)
        for g in gl.static_range(4):
            at = gradients[g].index((turn + 1) % 2).permute([1, 0])
            at.store(gl.where(keep, da[g], 0.0).to(dtype))
        saved = saved_at(buffers, place, s - 1, tile, n, u, CELLS, CONFIG)
