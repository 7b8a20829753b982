"""The recurrent product, tile by tile: states of a batch tile, read through memory, times weights kept on chip or streamed.

Both kernels add up ``a @ w`` where a is h_{t-1} (forward, one SEGMENT of H columns) or dgates_{t+1} (backward, four: one
for each gate), cut along the reduction into tiles of BLOCK_K. The first RESIDENT tiles of each segment are loaded once,
before the loop over time, and stay in shared memory; the others are loaded whenever they are used. With SWAP the tiles
are multiplied as w^T @ a^T: the tensor cores want 64 rows, which the gates of 16 units fill and a small batch does not.
"""

import triton
import triton.language as tl


@triton.jit
def weight_tile(w_cols, mask_n, segment, k, H: tl.constexpr, STRIDE_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights of reduction indices k .. k+BLOCK_K of a segment, (N, BLOCK_K); w_cols (N,) points at index 0 of segment 0."""
    offs_k = k + tl.arange(0, BLOCK_K)
    offs = (segment * H + offs_k).to(tl.int64) * STRIDE_K
    return tl.load(w_cols[:, None] + offs[None, :], mask=mask_n[:, None] & (offs_k < H)[None, :], other=0.0)


@triton.jit
def state_tile(a_rows, mask_rows, segment, k, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """States k .. k+BLOCK_K of a segment, (BLOCK_B, BLOCK_K), from the level of cache that all programs share."""
    offs_k = k + tl.arange(0, BLOCK_K)
    pointers = a_rows[:, None] + (segment * H + offs_k)[None, :]
    return tl.load(pointers, mask=mask_rows[:, None] & (offs_k < H)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def resident_weights(
    w_cols,
    mask_n,
    H: tl.constexpr,
    STRIDE_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first RESIDENT tiles of each segment, as a tuple: one tile each is what the compiler can place freely."""
    tiles = ()
    for segment in tl.static_range(SEGMENTS):
        for q in tl.static_range(RESIDENT):
            tile = weight_tile(w_cols, mask_n, segment, q * BLOCK_K, H, STRIDE_K, BLOCK_K)
            tiles = tiles + (tile,)  # noqa: RUF005 -- Triton knows no unpacking
            tl.debug_barrier()  # one tile after another: all at once would not fit into registers
    return tiles


@triton.jit
def multiply_add(acc, a, w, SWAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRET_BF16: tl.constexpr):
    """acc + a @ w^T for a (BLOCK_B, BLOCK_K), w (N, BLOCK_K), acc (BLOCK_B, N), transposed if SWAP."""
    if INTERPRET_BF16:
        a, w = a.to(tl.float32), w.to(tl.float32)
    if SWAP:
        acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    else:
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def product(
    a_rows,  # (BLOCK_B,) pointers at the first state of each row
    mask_rows,  # (BLOCK_B,) rows that have such states; zero for others
    resident,
    w_cols,
    mask_n,
    ACC: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    STRIDE_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET_BF16: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a @ w, (BLOCK_B, N), with a read from memory."""
    acc = accumulator(ACC, N, SWAP, BLOCK_B)
    for segment in tl.static_range(SEGMENTS):
        queue = ()  # loads under way, AHEAD of the tile that is multiplied
        for q in tl.static_range(RESIDENT + AHEAD):
            if q < RESIDENT:
                tile = state_tile(a_rows, mask_rows, segment, q * BLOCK_K, H, BLOCK_K)
                queue = queue + (tile,)  # noqa: RUF005
            if q >= AHEAD:
                w = resident[segment * RESIDENT + q - AHEAD]
                acc = multiply_add(acc, queue[q - AHEAD], w, SWAP, PRECISION, INTERPRET_BF16)
        for k in range(RESIDENT * BLOCK_K, H, BLOCK_K):
            a = state_tile(a_rows, mask_rows, segment, k, H, BLOCK_K)
            w = weight_tile(w_cols, mask_n, segment, k, H, STRIDE_K, BLOCK_K)
            acc = multiply_add(acc, a, w, SWAP, PRECISION, INTERPRET_BF16)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def accumulator(ACC: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr, BLOCK_B: tl.constexpr):
    if SWAP:
        acc = tl.zeros((N, BLOCK_B), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_B, N), dtype=ACC)
    return acc
