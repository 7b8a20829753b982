"""What a time step of the persistent forward kernel is made of: the same step with one part after another added.

Built of the kernels' own device functions. On the last rung it computes what the shipped kernel computes (plain input,
one direction), bit for bit, so that the two times can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from enum import IntEnum
from functools import partial

import torch
import triton
import triton.language as tl
from fused_lstm.kernels.barrier import arrive, wait
from fused_lstm.kernels.cell import cell_forward, narrow
from fused_lstm.kernels.product import product, resident_weights, state_tile
from timing import median_us

from fused_lstm import launch
from fused_lstm.choose import estimate, persistent
from fused_lstm.config import LaunchConfig, Recurrence, refusal


class Rung(IntEnum):
    BARRIER = 0
    EXCHANGE = 1  # and all of h is read, a part of it written
    PRODUCT = 2  # ... multiplied with the weights
    POINTWISE = 3  # ... the pre-activations are read, the cell is computed
    SAVES = 4  # ... gates and cell state are stored for the backward pass


@triton.jit
def nothing(x_ptr):
    pass


@triton.jit(do_not_specialize=["T", "B"])
def ladder_kernel(
    gates_ptr,  # (T * B, 4, H) in: pre-activations; out on the last rung: activated gates
    w_hh_ptr,  # (4, H, H)
    h_ptr,  # ((T + 1) * B, H): row t * B + b is the state before step t
    c_ptr,  # (T * B, H) out on the last rung
    arrived_ptr,  # (batch tiles, 16) zeros
    T,
    B,
    H: tl.constexpr,
    RUNG: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET_BF16: tl.constexpr,
    SWAP: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = tl.program_id(1) * ROWS + tl.arange(0, BLOCK_B)
    mask_b = (tl.arange(0, BLOCK_B) < ROWS) & (offs_b < B)
    mask = mask_b[:, None] & (offs_h < H)[None, :]
    arrived_ptr += tl.program_id(1) * 16
    offs_n = tl.arange(0, 4 * BLOCK_H)
    unit = tl.program_id(0) * BLOCK_H + offs_n // 4
    w_cols = w_hh_ptr + ((offs_n % 4).to(tl.int64) * H + unit) * H
    if RUNG >= 2:
        weights = resident_weights(w_cols, unit < H, H, 1, 1, RESIDENT, BLOCK_K)
    c = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
    rows = offs_b.to(tl.int64)

    for s in tl.range(0, T, num_stages=1, disable_licm=True):
        gate = gates_ptr + rows[:, None] * (4 * H) + offs_h[None, :]
        if RUNG >= 3:
            x_i = tl.load(gate, mask=mask, other=0.0)
            x_f = tl.load(gate + H, mask=mask, other=0.0)
            x_g = tl.load(gate + 2 * H, mask=mask, other=0.0)
            x_o = tl.load(gate + 3 * H, mask=mask, other=0.0)
        wait(arrived_ptr, s * tl.num_programs(0))
        h_new = c
        if RUNG == 1:
            total = tl.zeros((BLOCK_B,), dtype=tl.float32)
            for k in range(0, H, BLOCK_K):
                tile = state_tile(h_ptr + rows * H, mask_b, 0, k, H, BLOCK_K)
                total += tl.sum(tile.to(tl.float32), 1)
            h_new = c + total[:, None]
        if RUNG >= 2:
            acc = product(
                h_ptr + rows * H, mask_b, weights, w_cols, unit < H,
                tl.float32, 4 * BLOCK_H, H, 1, 1, RESIDENT, AHEAD, SWAP, PRECISION, INTERPRET_BF16, BLOCK_B, BLOCK_K,
            )  # fmt: skip
            even, odd = tl.split(tl.reshape(acc, (BLOCK_B, BLOCK_H, 2, 2)))
            a_i, a_g = tl.split(even)
            a_f, a_o = tl.split(odd)
            h_new = a_i + a_f + a_g + a_o
        if RUNG >= 3:
            i, f, g, o, c, h_new = cell_forward(
                a_i + x_i.to(tl.float32), a_f + x_f.to(tl.float32), a_g + x_g.to(tl.float32), a_o + x_o.to(tl.float32), c
            )
        if RUNG >= 1:
            h_new = narrow(h_new, dtype, INTERPRET_BF16)
            tl.store(h_ptr + (rows + B)[:, None] * H + offs_h[None, :], h_new, mask=mask)
        arrive(arrived_ptr)
        if RUNG >= 4:
            tl.store(c_ptr + rows[:, None] * H + offs_h[None, :], narrow(c, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gate, narrow(i, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gate + H, narrow(f, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gate + 2 * H, narrow(g, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gate + 3 * H, narrow(o, dtype, INTERPRET_BF16), mask=mask)
        rows += B


class Climb:
    """The buffers of one problem, and its launches."""

    def __init__(self, config: LaunchConfig, T: int, H: int, B: int, device: str = "cuda", dtype=torch.bfloat16) -> None:
        self.config, self.shape = config, (T, H, B)
        generator = torch.Generator(device).manual_seed(0)

        def numbers(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        self.x, self.w_hh = numbers(T * B, 1, 4, H), numbers(1, 4 * H, H, scale=H**-0.5)
        self.gates, self.h, self.c = self.x.clone(), numbers((T + 1) * B, 1, H), numbers(T * B, 1, H)
        self.h[:B] = 0

    def arguments(self, rung: Rung) -> tuple[tuple[int, int, int], tuple, dict]:
        """Grid, arguments and compile-time values of a launch."""
        T, H, B = self.shape
        grid = self.config.grid(H, B, 1)
        arrived = torch.zeros(grid[1], launch.COUNTER, dtype=torch.int64, device=self.x.device)
        meta = launch.constants(self.config, H) | dict(
            H=H, RUNG=int(rung), PRECISION="ieee",
            INTERPRET_BF16=launch.INTERPRETED and self.x.dtype == torch.bfloat16,
        )  # fmt: skip
        return grid, (self.gates, self.w_hh, self.h, self.c, arrived, T, B), _without_persistent(meta)

    def run(self, rung: Rung) -> None:
        grid, arguments, meta = self.arguments(rung)
        with torch.cuda.device_of(self.x) if self.x.is_cuda else nullcontext():
            ladder_kernel[grid](*arguments, **meta)

    def run_shipped(self) -> None:
        """The same by the library's kernel: into the same gates and cell states, h after B rows of zeros."""
        from fused_lstm.rows import Rows

        T, H, B = self.shape
        zero = torch.zeros(1, B, H, device=self.x.device, dtype=self.x.dtype)
        rows = Rows(T, B, False, 1, None, None)
        launch.recurrence_forward(self.gates, self.w_hh, zero, zero, rows, self.h[B:], self.c, self.config)


def _without_persistent(meta: dict) -> dict:
    return {k: v for k, v in meta.items() if k != "PERSISTENT"}


def step_us(rung: Rung, B: int, H: int, T: int = 500) -> float:
    """Microseconds of a time step with programs of 16 units each and no weights."""
    block_b = 16 if B <= 16 else 64
    climb = Climb(LaunchConfig(block_b, 16, min(256, H), persistent=True), T, H, B)
    return median_us(partial(climb.run, rung), 5) / T


def shapes() -> Iterator[tuple[int, int]]:
    yield from ((256, 16), (512, 16), (512, 64), (768, 16), (1024, 16), (1024, 64))


def config_of(H: int, B: int, device) -> LaunchConfig | None:
    """The persistent configuration with an exchange that the model of its time likes best."""
    problem = Recurrence("forward", "half", 2, H, B, 1)
    fitting = [
        c for c in persistent(problem, device)
        if refusal(c, problem, device) is None and not c.local(H) and c.resident == c.tiles(H)
    ]  # fmt: skip
    one_launch = [c for c in fitting if c.grid(H, B, 1)[0] * c.grid(H, B, 1)[1] <= device.multiprocessors]
    return min(one_launch, key=lambda c: estimate(c, problem, device), default=None)


def ladder(T: int = 500) -> dict[str, dict[str, float | str]]:
    """Microseconds of a time step on each rung, and of the shipped kernel, for some sizes in bf16."""
    device, record = launch.device(torch.cuda.current_device()), {}
    for H, B in shapes():
        config = config_of(H, B, device)
        if config is None:
            record[f"H={H} B={B}"] = {"not run": f"no persistent configuration fits {device.name}"}
            continue
        climb = Climb(config, T, H, B)
        steps: dict[str, float | str] = {r.name.lower(): median_us(partial(climb.run, r), 5) / T for r in Rung}
        steps["shipped"] = median_us(climb.run_shipped, 5) / T
        record[f"H={H} B={B}"] = steps | {"config": str(config)}
    return record
