"""What the persistent kernels share: configuration, layouts, and the exchange in which the data is its own flag.

A persistent kernel runs a whole sequence in one launch. A program owns CONFIG.units hidden units of all four gates, for
tiles of 8 batch rows in turn: the shape m16n8k16 of ``mma.sync`` (m16n8k8 in TF32), weights as operand A, states as operand
B. Its warps split the reduction, each over 32 k of every *chunk* of warps * 32; their partial sums meet in shared memory.

Programs pass states to one another through a buffer in global memory (forward ``h``, backward ``dgates``) that is full of
0xFF before the launch. Whoever needs a row loads it until no element has all its bits set: no barrier, no counter, no fence.
No program stores that pattern (:func:`exchangeable`). Rows that have no step before are read from elsewhere and not waited
for.

A thread loads its own fragments, 16 bytes at a time, with all loads of a tile in one piece of assembly, so that they are
under way together. For this the k of a chunk are dealt out alike in weights and states (:func:`k_of`).
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .cell import LayerNorm, Zoneout, masks, operand
from .rows import BatchRows, carried, data_rows, row_lengths, time_of

ROWS = 8  # batch rows of a tile


@dataclass(frozen=True)
class Fragments:
    """How the work is cut into programs: the one constexpr configuration of a persistent kernel."""

    H: int  # a multiple of 16, but where a program owns all units
    R: int
    directions: int  # 1 forward, -1 backwards in time, 2 both
    units: int = 16  # of a program; a multiple of 16 that divides H, or a power of two that is at least H
    warps: int = 8
    held: int = 64  # chunks of the weights that stay in registers, at most; the others lie in shared memory
    room: int = 1  # tiles of a program, at most
    ahead: bool = False  # a turn's states are asked for while the turn before is computed; with two tiles or more
    max16: bool = True  # the GPU has max.u16x2 (sm_90 and newer)
    zoneout: Zoneout | None = None
    norm: LayerNorm | None = None  # only where a program owns all units


@gluon.constexpr_function
def chunks(k, config):
    """Chunks of a reduction over k."""
    return -(-k // (config.warps * 32))


@gluon.constexpr_function
def beyond(q, k, config):
    """Whether chunk q of a reduction over k reaches beyond it."""
    return (q + 1) * config.warps * 32 > k


class Place(NamedTuple):
    """Sequences as one program sees them. Kernels make it themselves: Triton 3.6 returns no None from a function."""

    lengths_ptr: Any
    starts_ptr: Any
    resets_ptr: Any
    T: Any
    B: Any
    row_stride_t: Any
    row_stride_b: Any
    r: Any  # its recurrence
    first: Any  # its first batch row
    backwards: Any  # whether r runs backwards in time


class Step(NamedTuple):
    """Step s of 8 batch rows."""

    b: Any  # the batch rows
    lengths: Any
    row: Any  # data row of this step
    before: Any  # ... and of the one before it
    has: Any  # which rows have this step
    keep: Any  # ... and take over the state of the step before


@gluon.jit
def step_of(place, s, tile, n):
    """Step s of rows n (0 .. 7) of a program's tile."""
    b = place.first + tile * 8 + n
    lengths = row_lengths(place, b, b < place.B, place.T)
    batch = BatchRows(b, b < place.B, lengths, place.backwards, place.row_stride_t, place.row_stride_b)
    row = data_rows(place, batch, s)
    before = data_rows(place, batch, s - 1)
    has = (s >= 0) & (s < lengths)
    keep = carried(place, batch, s, row, before) & has
    return Step(b, lengths, row, before, has, keep)


@gluon.jit
def unit_values(buffers, r, u, FIRST: gl.constexpr, LAST: gl.constexpr, CONFIG: gl.constexpr):
    """For a program's units u, what the cell's own parameters are from row FIRST up to LAST."""
    ROWS: gl.constexpr = 3 if CONFIG.norm is None else CONFIG.norm.first + 6
    values = ()
    for n in gl.static_range(FIRST, LAST):
        p = gl.load(buffers.units_ptr + (r * ROWS + n) * CONFIG.H + u, mask=u < CONFIG.H, other=0.0)
        values = values + (p.to(gl.float32),)
    return values


@gluon.jit
def own_values(buffers, r, u, CONFIG: gl.constexpr):
    """What a program has of the cell for its units u: peepholes, or () without; and the seed of masks, or ()."""
    peepholes = ()
    seed = ()
    if buffers.units_ptr is not None:
        peepholes = unit_values(buffers, r, u, 0, 3 if CONFIG.norm is None else CONFIG.norm.first, CONFIG)
    if buffers.seed_ptr is not None:
        seed = (gl.load(buffers.seed_ptr),)
    return peepholes, seed


@gluon.jit
def masks_at(seed, place, s, tile, n, u, CONFIG: gl.constexpr):
    """The masks of zoneout for step s of units u. They wait for nothing: a turn draws them before it waits."""
    kept = ()
    if CONFIG.zoneout is not None:
        ZONEOUT: gl.constexpr = CONFIG.zoneout  # Triton 3.6 takes it by a name only
        step = step_of(place, s, tile, n)
        t = gl.expand_dims(time_of(place.backwards, step.lengths, s), 0)
        b = gl.expand_dims(step.b, 0)
        kept = masks(seed, t, b, place.r, u, place.B, CONFIG.R, CONFIG.H, ZONEOUT)
    return kept


@gluon.constexpr_function
def mma_layout(warps):
    """Products of (warps, m, k) and (warps, k, 8): a part of the reduction for each warp."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def operand_layout(operand, warps):
    return gl.DotOperandLayout(operand, mma_layout(warps), 4)


@gluon.constexpr_function
def parts_layout(warps, units):
    """Partial sums (warps, units, 8): a thread has all parts of its elements; along the units as many warps as they fill."""
    across = min(warps, units // 4)
    return gl.BlockedLayout([warps, 1, 1], [1, 4, 8], [1, across, warps // across], [0, 2, 1])


@gluon.constexpr_function
def cell_layout(warps, units):
    """(units, 8): the sum over the parts, on which the cell works."""
    return gl.SliceLayout(0, parts_layout(warps, units))


@gluon.constexpr_function
def unit_layout(warps, units):
    return gl.SliceLayout(1, cell_layout(warps, units))


@gluon.constexpr_function
def row_layout(warps, units):
    return gl.SliceLayout(0, cell_layout(warps, units))


@gluon.constexpr_function
def columns_layout(warps, units, dtype):
    """(warps, units, 32) of weights whose units are neighbours in memory: 16 bytes of them for each thread."""
    each = 128 // dtype.primitive_bitwidth
    return gl.BlockedLayout([1, each, 1], [1, units // each, 32 * each // units], [warps, 1, 1], [1, 2, 0])


@gluon.constexpr_function
def along(layout, axis):
    """The layout of one axis of a 3-D one."""
    inner, outer = {0: (1, 2), 1: (0, 2), 2: (0, 1)}[axis]
    return gl.SliceLayout(inner, gl.SliceLayout(outer, layout))


@triton.jit
def barrier():
    """All threads of the program have stored what they keep in shared memory; at the start, so that no turn need ask."""
    tl.debug_barrier()


@gluon.jit
def cube(x, axis: gl.constexpr):
    """A 1-D tensor as one axis of a 3-D one."""
    if axis == 0:
        x = gl.expand_dims(gl.expand_dims(x, 1), 2)
    elif axis == 1:
        x = gl.expand_dims(gl.expand_dims(x, 0), 2)
    else:
        x = gl.expand_dims(gl.expand_dims(x, 0), 1)
    return x


@gluon.jit
def k_of(k):
    """Where position k of a warp's 32 lies in memory: a thread's 8 positions are neighbours there."""
    return ((k % 16) // 4) * 8 + (k // 16) * 4 + k % 4


@gluon.jit
def exchangeable(x, dtype: gl.constexpr):
    """x rounded to dtype, and never with all bits set: that NaN becomes another one."""
    x = x.to(dtype)
    if dtype.primitive_bitwidth == 16:
        bits = x.to(gl.int16, bitcast=True)
        bits = gl.where(bits == -1, 0x7FFF, bits).to(gl.int16)
    else:
        bits = x.to(gl.int32, bitcast=True)
        bits = gl.where(bits == -1, 0x7FFFFFFF, bits).to(gl.int32)
    return bits.to(dtype, bitcast=True)


@gluon.jit
def weight_chunk(w_ptr, k, inside, stride, q: gl.constexpr, K: gl.constexpr, CONFIG: gl.constexpr):
    """Chunk q of a program's weights as operand A: w_ptr points at the elements of chunk 0, zero where not inside."""
    at = w_ptr + q * CONFIG.warps * 32 * stride
    if beyond(q, K, CONFIG):
        chunk = gl.load(at, mask=inside & (k + q * CONFIG.warps * 32 < K), other=0.0)
    else:
        chunk = gl.load(at, mask=inside, other=0.0)
    return operand(gl.convert_layout(chunk, operand_layout(0, CONFIG.warps)), "tf32")


@gluon.jit
def load_weights(w_ptr, k, inside, stride, ROWS: gl.constexpr, K: gl.constexpr, CONFIG: gl.constexpr):
    """A program's weights, (warps, ROWS, 32) for each chunk: those held in registers, and the others in shared memory.

    w_ptr points at the elements of chunk 0, k is their place in the reduction over K, and stride what lies between two k.
    """
    dtype: gl.constexpr = w_ptr.dtype.element_ty
    WARPS: gl.constexpr = CONFIG.warps
    CHUNKS: gl.constexpr = chunks(K, CONFIG)
    HELD: gl.constexpr = min(CONFIG.held, CHUNKS)
    held = ()
    rest = ()
    if HELD < CHUNKS:
        shape: gl.constexpr = [CHUNKS - HELD, WARPS, ROWS, 32]
        rest = (gl.allocate_shared_memory(dtype, shape, gl.SwizzledSharedLayout(4, 2, 8, [2, 1, 0])),)
        for q in gl.static_range(HELD, CHUNKS):
            rest[0].index(q - HELD).store(weight_chunk(w_ptr, k, inside, stride, q, K, CONFIG))
            barrier()  # else the compiler loads all of them before it stores any
    for q in gl.static_range(HELD):
        held = held + (weight_chunk(w_ptr, k, inside, stride, q, K, CONFIG),)
    return held, rest


@gluon.constexpr_function
def registers(dtype):
    """32-bit registers of 8 elements, those that a thread has of a chunk."""
    return dtype.primitive_bitwidth // 4


@gluon.constexpr_function
def exchange_code(chunks, chunk_bytes, each, edge, settle, wait, max16):
    """Load a thread's pieces of all chunks; with ``wait``, again until no element has all bits set.

    Operands: the registers of the pieces (``each`` for a chunk), those of an earlier try (``settle``), an address, one for
    the last chunk (``edge``), and a register (``wait``) with all bits set where there is something to wait for, else 0.
    """
    n = each * chunks
    first = 2 * n if settle else n
    address, last, mask = first, first + 8, first + (16 if edge else 8)
    loads = []
    for q in range(chunks):
        at, offset = (last, 0) if edge and q == chunks - 1 else (address, q * chunk_bytes)
        for half in range(each // 4):
            four = ",".join(f"${q * each + 4 * half + i}" for i in range(4))
            loads.append(f"ld.relaxed.gpu.global.v4.b32 {{{four}}}, [${at}+{offset + 16 * half}];")
    if not wait:
        return "\n".join(loads)
    lines = ["{", ".reg .pred p;", ".reg .b32 m, a, b;", *(["bra.uni check;"] if settle else []), "again:", *loads, "check:"]
    if each == 8:
        lines += ["mov.b32 m, $0;", *(f"max.u32 m, m, ${r};" for r in range(1, n))]
        lines += [f"and.b32 m, m, ${mask};", "setp.eq.u32 p, m, 0xffffffff;"]
    elif max16:
        lines += ["mov.b32 m, $0;", *(f"max.u16x2 m, m, ${r};" for r in range(1, n)), f"and.b32 m, m, ${mask};"]
        lines += ["shr.u32 a, m, 16;", "and.b32 b, m, 0xffff;", "max.u32 a, a, b;", "setp.eq.u32 p, a, 0xffff;"]
    else:  # a half of ~x is zero where the subtraction of 1 borrows into a top bit that was 0
        lines.append("mov.b32 m, 0;")
        for r in range(n):
            lines += [f"sub.u32 a, 0xfffefffe, ${r};", f"and.b32 a, a, ${r};", "or.b32 m, m, a;"]
        lines += ["and.b32 m, m, 0x80008000;", f"and.b32 m, m, ${mask};", "setp.ne.u32 p, m, 0;"]
    return "\n".join([*lines, "@p bra again;", "}"])


@gluon.constexpr_function
def exchange_constraints(chunks, each, edge, settle, wait):
    n = each * chunks
    earlier = [str(i) for i in range(n)] if settle else []
    return ",".join(["=&r"] * n + earlier + ["l"] * (16 if edge else 8) + (["r"] * 8 if wait else []))


@gluon.constexpr_function
def kinds(dtype, n):
    return (gl.int32 if dtype == gl.float32 else dtype,) * n


class Source(NamedTuple):
    """Where 8 rows of states lie, as the threads that load them need it."""

    address: Any  # (warps, 32, 8) of each thread's piece of the first chunk
    edge: Any  # ... of the last chunk, if that reaches beyond the row: a tuple of one or none
    wait: Any  # all bits set where another program has to store the row first, else 0


@gluon.jit
def source_at(rows, zeros, wait, K: gl.constexpr, CONFIG: gl.constexpr):
    """The fragments of 8 rows of K elements, from pointers to them; zeros points at K zeros, and at least warps * 32."""
    LAYOUT: gl.constexpr = operand_layout(1, CONFIG.warps)
    CHUNKS: gl.constexpr = chunks(K, CONFIG)
    w = gl.arange(0, CONFIG.warps, along(LAYOUT, 0))
    k = gl.arange(0, 32, along(LAYOUT, 1))
    piece = cube(w * 32, 0) + cube(((k % 16) // 4) * 8, 1)
    address = cube(rows, 2) + piece
    if beyond(CHUNKS - 1, K, CONFIG):
        last = piece + (CHUNKS - 1) * CONFIG.warps * 32
        edge = (gl.where(last < K, cube(rows, 2) + last, zeros + piece).to(gl.uint64, bitcast=True),)
    else:
        edge = ()
    return Source(address.to(gl.uint64, bitcast=True), edge, cube(gl.where(wait, -1, 0), 2) + piece * 0)


@gluon.jit
def begin(source, dtype: gl.constexpr, K: gl.constexpr, CONFIG: gl.constexpr):
    """Begin to load the fragments; :func:`settle` says when they are there."""
    CHUNKS: gl.constexpr = chunks(K, CONFIG)
    EACH: gl.constexpr = registers(dtype)
    EDGE: gl.constexpr = len(source.edge) > 0
    return gl.inline_asm_elementwise(
        exchange_code(CHUNKS, CONFIG.warps * EACH * 16, EACH, EDGE, False, False, CONFIG.max16),
        exchange_constraints(CHUNKS, EACH, EDGE, False, False),
        (source.address,) + source.edge, dtype=kinds(dtype, CHUNKS), is_pure=False, pack=8,
    )  # fmt: skip


@gluon.jit
def settle(begun, source, dtype: gl.constexpr, K: gl.constexpr, CONFIG: gl.constexpr):
    """The fragments, one (warps, 32, 8) for each chunk, once they are there. begun is from :func:`begin`, or ()."""
    CHUNKS: gl.constexpr = chunks(K, CONFIG)
    EACH: gl.constexpr = registers(dtype)
    EDGE: gl.constexpr = len(source.edge) > 0
    BEGUN: gl.constexpr = len(begun) > 0
    found = gl.inline_asm_elementwise(
        exchange_code(CHUNKS, CONFIG.warps * EACH * 16, EACH, EDGE, BEGUN, True, CONFIG.max16),
        exchange_constraints(CHUNKS, EACH, EDGE, BEGUN, True),
        begun + (source.address,) + source.edge + (source.wait,), dtype=kinds(dtype, CHUNKS), is_pure=False, pack=8,
    )  # fmt: skip
    operands = ()
    for q in gl.static_range(CHUNKS):
        operands = operands + (operand(found[q].to(dtype, bitcast=True), "tf32"),)
    return operands


@gluon.jit
def row_or_past_end(place, step, s):
    """The data row of a step; past a row's end, where others may expect zeros, the one that lies there."""
    past = s * place.row_stride_t.to(gl.int64) + step.b * place.row_stride_b.to(gl.int64)
    return gl.where(step.has, step.row, past)


@gluon.jit
def turn_after(s, tile, tiles, step: gl.constexpr):
    """The (step, tile) pair that follows: all tiles of a step, then those of the next one."""
    last = tile + 1 == tiles
    return gl.where(last, s + step, s), gl.where(last, 0, tile + 1)
