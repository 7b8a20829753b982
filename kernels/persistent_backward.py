"""Backward recurrence, persistent: as the forward one, with dgates as what is exchanged and W_hh's columns as weights.

A program reduces over all four gates of all units: dh of its units is dgates @ W_hh. Results that the next turn needs of its
own step are loaded one turn ahead.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .cell import products_backward, zoned_backward
from .fragments import (
    Place,
    along,
    barrier,
    begin,
    cell_layout,
    chunks,
    columns_layout,
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
def lstm_backward_fragments(
    buffers, sequences, T, B, tiles, first_r, row_stride_t, row_stride_b, CELL: gl.constexpr, CONFIG: gl.constexpr
):
    """Grid (H / units, groups of tiles, recurrences first_r ..); tiles are those of a program, at most CONFIG.room."""
    dtype: gl.constexpr = buffers.dgates_ptr.dtype.element_ty
    H: gl.constexpr = CONFIG.H
    WARPS: gl.constexpr = CONFIG.warps
    UNITS: gl.constexpr = CONFIG.units
    CHUNKS: gl.constexpr = chunks(4 * H, CONFIG)
    A: gl.constexpr = operand_layout(0, WARPS)
    ROOM: gl.constexpr = CONFIG.room
    CELLS: gl.constexpr = cell_layout(WARPS, UNITS)
    r = (first_r + gl.program_id(2)).to(gl.int64)
    first = gl.program_id(1) * (tiles * 8)
    place = Place(*sequences, T, B, row_stride_t, row_stride_b, r, first, runs_backwards(r, CONFIG.directions))
    u0 = gl.program_id(0) * UNITS
    n = gl.arange(0, 8, row_layout(WARPS, UNITS))
    u = gl.expand_dims(u0 + gl.arange(0, UNITS, unit_layout(WARPS, UNITS)), 1)
    k_rows = gl.arange(0, 8, along(operand_layout(1, WARPS), 2))
    # before the weights, whose conversion would else share its memory and ask for a barrier in the loop
    parts = gl.allocate_shared_memory(gl.float32, [WARPS, UNITS, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    state = gl.allocate_shared_memory(gl.float32, [ROOM, UNITS, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    held, rest = backward_weights(buffers.w_hh_ptr + place.r * (4 * H * H), u0, CONFIG)
    for tile in range(tiles):
        state.index(tile).store(initial_gradient(buffers, place, tile, n, u, CELLS, CONFIG))
    peepholes, seed = own_values(buffers, r, u, CONFIG)
    if CONFIG.zoneout is not None:
        beside = gl.allocate_shared_memory(gl.float32, [ROOM, UNITS, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        for tile in range(tiles):
            beside.index(tile).store(gl.zeros([UNITS, 8], gl.float32, CELLS))

    s = gl.to_tensor(0) + T - 1
    tile = gl.to_tensor(0)
    saved = saved_at(buffers, place, s, tile, n, u, CELLS, CONFIG)
    begun = ()
    if CONFIG.ahead:
        begun = begin(gradients_after(buffers, place, s, tile, k_rows, CONFIG), dtype, 4 * H, CONFIG)
    barrier()
    for _ in range(T * tiles):
        dc = state.index(tile).load(CELLS)  # so early, the barrier that it needs serves the parts as well
        passed = ()
        if CONFIG.zoneout is not None:
            passed = (beside.index(tile).load(CELLS),)
        own = Own(peepholes, (), masks_at(seed, place, s, tile, n, u, CONFIG), passed)
        da = settle(begun, gradients_after(buffers, place, s, tile, k_rows, CONFIG), dtype, 4 * H, CONFIG)
        s1, tile1 = turn_after(s, tile, tiles, -1)
        if CONFIG.ahead:
            begun = begin(gradients_after(buffers, place, s1, tile1, k_rows, CONFIG), dtype, 4 * H, CONFIG)
        acc = gl.zeros([WARPS, UNITS, 8], gl.float32, mma_layout(WARPS))
        for j in gl.static_range(min(4, CHUNKS)):  # sums of their own, which need not wait for one another
            of_j = gl.zeros([WARPS, UNITS, 8], gl.float32, mma_layout(WARPS))
            for q in gl.static_range(j, CHUNKS, 4):
                if q < len(held):
                    of_j = mma_v2(held[q], da[q], of_j, input_precision="tf32")
                else:
                    of_j = mma_v2(rest[0].index(q - len(held)).load(A), da[q], of_j, input_precision="tf32")
            acc = acc + of_j
        parts.store(acc)
        dh = gl.sum(parts.load(parts_layout(WARPS, UNITS)), axis=0)
        step = step_of(place, s, tile, n)
        _, dc, passed = step_backward(buffers, place, step, s, u, dh, dc, saved, own, CELL, None, CONFIG)
        state.index(tile).store(dc)
        if CONFIG.zoneout is not None:
            beside.index(tile).store(passed[0])
        saved = saved_at(buffers, place, s1, tile1, n, u, CELLS, CONFIG)
        s = s1
        tile = tile1


@gluon.jit
def backward_weights(w_ptr, u0, CONFIG: gl.constexpr):
    """The columns of W_hh of units u0 .. ."""
    COLUMNS: gl.constexpr = columns_layout(CONFIG.warps, CONFIG.units, w_ptr.dtype.element_ty)
    unit = cube(u0 + gl.arange(0, CONFIG.units, along(COLUMNS, 1)), 1)
    k = cube(gl.arange(0, CONFIG.warps, along(COLUMNS, 0)) * 32, 0) + cube(k_of(gl.arange(0, 32, along(COLUMNS, 2))), 2)
    inside = (unit < CONFIG.H) & (k >= 0)
    return load_weights(w_ptr + unit + k * CONFIG.H, k, inside, CONFIG.H, CONFIG.units, 4 * CONFIG.H, CONFIG)


@gluon.jit
def initial_gradient(buffers, place, tile, n, u, CELLS: gl.constexpr, CONFIG: gl.constexpr):
    """The gradient by a tile's last cell states that comes from outside."""
    UNITS: gl.constexpr = CONFIG.units
    dc = gl.zeros([UNITS, 8], gl.float32, CELLS)
    if buffers.dcn_ptr is not None:
        b = place.first + tile * 8 + n
        at = gl.expand_dims((place.r * place.B + b) * CONFIG.H, 0) + u
        dc = gl.load(buffers.dcn_ptr + at, mask=gl.expand_dims(b < place.B, 0) & (u < CONFIG.H), other=0.0).to(gl.float32)
    return dc


@gluon.jit
def gradients_after(buffers, place, s, tile, n, CONFIG: gl.constexpr):
    """Where step s finds the dgates of the step after it: at its data row, or at zeros if no gradient comes from there."""
    step = step_of(place, s + 1, tile, n)
    rows = buffers.dgates_ptr + (step.row * CONFIG.R + place.r) * (4 * CONFIG.H)
    rows = gl.where(step.keep, rows, buffers.zeros_ptr + step.row * 0)
    return source_at(rows, buffers.zeros_ptr, step.keep, 4 * CONFIG.H, CONFIG)


class Saved(NamedTuple):
    """All that a step needs but the gradients of the step after it."""

    activated: Any  # i, f, g, o
    c: Any  # with norms: minus its mean
    c_prev: Any
    h_prev: Any  # with norms: (), and the next three () without
    products: Any  # minus their mean
    products_rstd: Any
    c_rstd: Any
    dy: Any
    dhn: Any


@gluon.jit
def saved_at(buffers, place, s, tile, n, u, CELLS: gl.constexpr, CONFIG: gl.constexpr):
    UNITS: gl.constexpr = CONFIG.units
    step = step_of(place, s, tile, n)
    has = gl.expand_dims(step.has, 0) & (u < CONFIG.H)
    at = gl.expand_dims((step.row * CONFIG.R + place.r) * CONFIG.H, 0) + u
    gate = buffers.gates_ptr + gl.expand_dims((step.row * CONFIG.R + place.r) * (4 * CONFIG.H), 0) + u
    activated = ()
    for g in gl.static_range(4):
        activated = activated + (gl.load(gate + g * CONFIG.H, mask=has, other=0.0),)
    h_prev = ()
    products = ()
    products_rstd = ()
    c_rstd = ()
    if CONFIG.norm is None:
        c = gl.load(buffers.c_ptr + at, mask=has, other=0.0)
        c_prev = before(buffers.c_ptr, buffers.c0_ptr, place, step, s, u, CONFIG)
        h_prev = before(buffers.h_ptr, buffers.h0_ptr, place, step, s, u, CONFIG)
    else:
        row = step.row * CONFIG.R + place.r
        c = gl.load(buffers.c_centered_ptr + at, mask=has, other=0.0)
        c_prev = gl.load(buffers.c_prev_ptr + at, mask=has, other=0.0)
        c_rstd = gl.load(buffers.c_rstd_ptr + row, mask=step.has, other=0.0)
        product = buffers.products_ptr + gl.expand_dims(row * (4 * CONFIG.H), 0) + u
        for g in gl.static_range(4):
            products = products + (gl.load(product + g * CONFIG.H, mask=has, other=0.0),)
        products_rstd = gl.load(buffers.products_rstd_ptr + row, mask=step.has, other=0.0)
    dy = gl.zeros([UNITS, 8], buffers.gates_ptr.dtype.element_ty, CELLS)
    if buffers.dy_ptr is not None:
        dy = gl.load(buffers.dy_ptr + at, mask=has, other=0.0)
    dhn = gl.zeros([UNITS, 8], buffers.gates_ptr.dtype.element_ty, CELLS)
    if buffers.dhn_ptr is not None:
        end = gl.expand_dims((place.r * place.B + step.b) * CONFIG.H, 0) + u
        dhn = gl.load(buffers.dhn_ptr + end, mask=has & gl.expand_dims(s == step.lengths - 1, 0), other=0.0)
    return Saved(activated, c, c_prev, h_prev, products, products_rstd, c_rstd, dy, dhn)


@gluon.jit
def before(all_ptr, start_ptr, place, step, s, u, CONFIG: gl.constexpr):
    """The state before step s, of (N, R, H) or, before the first step, of (R, B, H)."""
    keep = gl.expand_dims(step.keep, 0) & (u < CONFIG.H)
    row = all_ptr + (step.before * CONFIG.R + place.r) * CONFIG.H
    if start_ptr is None:
        keep = keep & (s > 0)
    else:
        row = gl.where(step.before * 0 + s > 0, row, start_ptr + (place.r * place.B + step.b) * CONFIG.H)
    return gl.load(gl.expand_dims(row, 0) + u, mask=keep, other=0.0)


class Own(NamedTuple):
    """What cells other than torch's add to a step."""

    peepholes: Any  # three, or ()
    norm: Any  # a Norm, or ()
    kept: Any  # masks of zoneout: of h and c, or ()
    passed: Any  # of zoneout, what of dh comes from the step after beside its products; else ()


@gluon.jit
def step_backward(
    buffers, place, step, s, u, dh, dc, saved, own, CELL: gl.constexpr, SUM: gl.constexpr, CONFIG: gl.constexpr
):
    """Store the gradients of a turn, dgates first, which others wait for. Returns those by the products; dc and what ``own``
    passes for the step before.

    dh and dc are those that come from the step after.
    """
    NORM: gl.constexpr = CONFIG.norm
    dtype: gl.constexpr = buffers.dgates_ptr.dtype.element_ty
    PAST: gl.constexpr = place.lengths_ptr is not None and place.starts_ptr is None
    has = gl.expand_dims(step.has, 0) & (u < CONFIG.H)
    in_batch = gl.expand_dims(step.b < place.B, 0) & (u < CONFIG.H)
    i, f, g, o = saved.activated
    activated = (i.to(gl.float32), f.to(gl.float32), g.to(gl.float32), o.to(gl.float32))
    dh = dh + saved.dy.to(gl.float32) + saved.dhn.to(gl.float32)
    c = saved.c.to(gl.float32)
    c_prev = saved.c_prev.to(gl.float32)
    c_rstd = ()
    if NORM is not None:
        c_rstd = gl.expand_dims(saved.c_rstd, 0)
    passed = ()
    if CONFIG.zoneout is None:
        da, dc_prev, dshown = CELL(activated, c, c_prev, dh, dc, own.peepholes, own.norm, c_rstd, NORM, SUM)
    else:
        ZONEOUT: gl.constexpr = CONFIG.zoneout
        dh += own.passed[0]
        da, dc_prev, dshown, dh_prev = zoned_backward(
            activated, c, c_prev, dh, dc, own.peepholes, own.norm, c_rstd, own.kept, CELL, NORM, SUM, ZONEOUT
        )
        passed = (until_start(place, step, u, dh_prev, own.passed[0], CONFIG),)
    row = step.row
    if PAST:  # zeros past a row's end, for the products that follow
        row = row_or_past_end(place, step, s)
    gate = buffers.dgates_ptr + gl.expand_dims((row * CONFIG.R + place.r) * (4 * CONFIG.H), 0) + u
    gradients = ()
    for j in gl.static_range(4):
        gradients = gradients + (exchangeable(da[j], dtype),)
        if PAST:
            gl.store(gate + j * CONFIG.H, gl.where(has, gradients[j], 0.0).to(dtype), mask=in_batch)
        else:
            gl.store(gate + j * CONFIG.H, gradients[j], mask=has)
    dc_prev = until_start(place, step, u, dc_prev, dc, CONFIG)
    at = gl.expand_dims((row * CONFIG.R + place.r) * CONFIG.H, 0) + u
    if NORM is not None:
        gl.store(buffers.dshown_ptr + at, dshown, mask=has)
        rstd = gl.expand_dims(saved.products_rstd, 0)
        gradients = products_backward(da, saved.products, rstd, own.norm, NORM, SUM)
    elif PAST:
        gl.store(buffers.h_prev_ptr + at, saved.h_prev, mask=in_batch)  # loaded as zero there
    else:
        gl.store(buffers.h_prev_ptr + at, saved.h_prev, mask=has)
    end = gl.expand_dims((place.r * place.B + step.b) * CONFIG.H, 0) + u
    if buffers.dc0_ptr is not None:
        gl.store(buffers.dc0_ptr + end, dc_prev.to(dtype), mask=in_batch & (s == 0))
    if CONFIG.zoneout is not None:
        gl.store(buffers.passed_ptr + end, passed[0], mask=in_batch & (s == 0))
    return gradients, dc_prev, passed


@gluon.jit
def until_start(place, step, u, before, after, CONFIG: gl.constexpr):
    """A gradient by the state before a step: none where the state is not carried over, that of after past a row's end."""
    if place.resets_ptr is not None:
        before = gl.where(gl.expand_dims(step.keep, 0) & (u < CONFIG.H), before, 0.0)
    if place.lengths_ptr is not None:
        before = gl.where(gl.expand_dims(step.has, 0) & (u < CONFIG.H), before, after)
    return before
