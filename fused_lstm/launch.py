"""Launchers of the Triton kernels: which tiles, which grid, one launch per time step.

This module needs Triton; nothing else in the package imports it before a kernel is to run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .kernels.backward import lstm_backward_kernel
from .kernels.forward import lstm_forward_kernel
from .rows import Rows, accumulator_dtype
from .tf32 import tf32_allowed

# TRITON_INTERPRET=1, set before the kernels are imported, makes them run on CPU tensors.
INTERPRETED = not isinstance(lstm_forward_kernel, triton.JITFunction)

# Triton 3.6's compiler stops at some fp64 products ("fp64 don't support largeK MMA"); 3.9's takes them all.
FP64 = INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into programs and compiled.

    A program owns ``block_h`` hidden units for ``block_b`` batch rows and walks its reduction in tiles of ``block_k``.
    """

    block_b: int
    block_h: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    def grid(self, H: int, B: int, R: int) -> tuple[int, int, int]:
        return triton.cdiv(H, self.block_h), triton.cdiv(B, self.block_b), R


@dataclass(frozen=True)
class Device:
    """What :func:`choose` needs to know of a GPU."""

    name: str
    multiprocessors: int


@lru_cache
def device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, properties.multi_processor_count)


@dataclass(frozen=True)
class Tiles:
    """The tiles open to :func:`choose` for one kind of arithmetic.

    Bounded by registers (no spills on sm_90) and by the 64 KB of shared memory that every target has; tests/test_compile.py
    compiles each of them for each target.
    """

    max_block_b: int
    blocks_h: tuple[int, ...]  # largest first
    block_k: int
    wide: int  # tiles of at least this many elements take 8 warps
    num_stages: int = 2
    small_stages: int = 2  # of tiles with fewer than 512 elements

    def config(self, block_b: int, block_h: int) -> LaunchConfig:
        num_warps = 8 if block_b * block_h >= self.wide else 4
        num_stages = self.small_stages if block_b * block_h < 512 else self.num_stages
        return LaunchConfig(block_b, block_h, self.block_k, num_warps, num_stages)


TILES = {
    "half": Tiles(max_block_b=64, blocks_h=(32, 16), block_k=64, wide=4096),
    "tf32": Tiles(max_block_b=64, blocks_h=(32, 16), block_k=32, wide=2048, small_stages=3),
    "fp32": Tiles(max_block_b=64, blocks_h=(16,), block_k=16, wide=512, num_stages=3, small_stages=3),
    "fp64": Tiles(max_block_b=16, blocks_h=(16,), block_k=16, wide=512),
}


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """The key of :data:`TILES` for a dtype, with fp32 products in TF32 or not."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if dtype == torch.float64 else "half"


def choose(dtype: torch.dtype, tf32: bool, H: int, B: int, R: int, device: Device | None) -> LaunchConfig:
    """The stepwise configuration of a problem; a pure function, so that it can be tested without a GPU.

    Args:
        dtype, tf32: data type, and whether fp32 products may be TF32.
        H, B, R: hidden size, batch rows, recurrences.
        device: the GPU, or None in Triton's interpreter.

    A heuristic that was not measured on any device: the largest tile of hidden units that still gives every
    multiprocessor a program.
    """
    if device is None:  # the interpreter's time goes by the number of operations, not by their size
        return LaunchConfig(block_b=16, block_h=64, block_k=256)
    tiles = TILES[arithmetic(dtype, tf32)]
    block_b = min(max(triton.next_power_of_2(B), 16), tiles.max_block_b)
    for block_h in tiles.blocks_h:
        x, y, z = tiles.config(block_b, block_h).grid(H, B, R)
        if block_h <= H and x * y * z >= device.multiprocessors:
            break
    return tiles.config(block_b, block_h)


def shipped(dtype: torch.dtype, tf32: bool) -> list[LaunchConfig]:
    """Every configuration that :func:`choose` can return for a dtype."""
    tiles = TILES[arithmetic(dtype, tf32)]
    return [
        tiles.config(block_b, block_h)
        for block_b in (16, 32, 64)
        if block_b <= tiles.max_block_b
        for block_h in tiles.blocks_h
    ]


def _meta(gates: Tensor, rows: Rows, config: LaunchConfig, R: int, H: int, has_h0: bool) -> dict:
    return dict(
        R=R, H=H, DIRECTIONS=rows.directions, HAS_H0=has_h0,
        LENGTHS=rows.lengths is not None, PACKED=rows.batch_sizes is not None, RESETS=rows.resets is not None,
        PRECISION="tf32" if _tf32(gates) else "ieee",
        INTERPRET_BF16=INTERPRETED and gates.dtype == torch.bfloat16,
        BLOCK_B=config.block_b, BLOCK_H=config.block_h, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _tf32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_cuda and tf32_allowed()


def _guard(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def _device(tensor: Tensor) -> Device | None:
    return device(tensor.device.index) if tensor.is_cuda else None


def recurrence_forward(
    gates: Tensor,  # (N, R, 4, H) in: x @ W_ih^T + biases; out, if c_all is given: activated gates
    w_hh: Tensor,  # (R, 4H, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor,  # (R, B, H)
    rows: Rows,
    y: Tensor,  # (N, R, H) out
    c_all: Tensor | None,  # (N, R, H) out
) -> tuple[Tensor, Tensor]:
    """One launch per time step. Returns h_n and c_n, (R, B, H)."""
    R, B, H = c0.shape
    dtype = accumulator_dtype(c0.dtype)
    if rows.lengths is None:
        h_n, c_n = torch.empty_like(c0), c0.new_empty(c0.shape, dtype=dtype)
    else:  # a row without steps keeps its initial state
        h_n, c_n = torch.zeros_like(c0) if h0 is None else h0.clone(), c0.to(dtype, copy=True)
    if B:
        config = choose(gates.dtype, _tf32(gates), H, B, R, _device(gates))
        meta = _meta(gates, rows, config, R, H, h0 is not None)
        starts, resets = rows.starts(), None if rows.resets is None else rows.resets.view(torch.uint8)
        with _guard(gates):
            for s in range(rows.T):
                lstm_forward_kernel[config.grid(H, B, R)](
                    gates, w_hh, y, y if c_all is None else c_all, c0 if h0 is None else h0, c0, h_n, c_n,
                    rows.lengths, starts, resets, s, rows.T, B, rows.stride_t, rows.stride_b, SAVE=c_all is not None, **meta,
                )  # fmt: skip
    return h_n, c_n.to(c0.dtype)


def recurrence_backward(
    dy: Tensor,  # (N, R, H)
    dh_n: Tensor,  # (R, B, H)
    dc_n: Tensor,  # (R, B, H)
    gates: Tensor,  # (N, R, 4, H) activated
    c_all: Tensor,  # (N, R, H)
    y: Tensor,  # (N, R, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor,  # (R, B, H)
    w_hh: Tensor,  # (R, 4H, H)
    rows: Rows,
    dgates: Tensor,  # (N, R, 4, H) out
    h_prev: Tensor,  # (N, R, H) out
) -> Tensor:
    """One launch per time step, last step first. Returns dc_0, (R, B, H)."""
    R, B, H = c0.shape
    dc = dc_n.to(accumulator_dtype(dc_n.dtype), copy=True)
    if B:
        config = choose(gates.dtype, _tf32(gates), H, B, R, _device(gates))
        meta = _meta(gates, rows, config, R, H, h0 is not None)
        starts, resets = rows.starts(), None if rows.resets is None else rows.resets.view(torch.uint8)
        with _guard(gates):
            for s in range(rows.T - 1, -1, -1):
                lstm_backward_kernel[config.grid(H, B, R)](
                    dy, dh_n, dc, gates, c_all, y, c0 if h0 is None else h0, c0, w_hh, dgates, h_prev,
                    rows.lengths, starts, resets, s, rows.T, B, rows.stride_t, rows.stride_b, **meta,
                )  # fmt: skip
    return dc.to(dc_n.dtype)
