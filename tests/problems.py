"""Random arguments of one layer's op, and what the engines make of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from checks import DEVICE, Rule, skip_unless_it_compiles
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_lstm import Cell, ops, recurrence, reference
from fused_lstm.call import LayerCall

TORCHS = Cell()


class Problem:
    """A call, ``given``, and cotangents: numbers of ``dtype``, held in fp64. Without I, x holds pre-activations."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        T: int = 4,
        B: int = 3,
        I: int | None = 5,  # noqa: E741
        H: int = 16,
        directions: int = 1,
        members: int = 1,
        K: int | None = None,
        mode: str = "padded",
        batch_first: bool = False,
        resets: bool = False,
        states: bool = True,
        bias: bool = True,
        scale: float = 0.5,
        cell: Cell = TORCHS,
        masks: bool = True,
    ) -> None:
        g = torch.Generator().manual_seed(T * 1000 + B * 100 + H)

        def numbers(*shape: int, scale: float = scale) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).double()

        R, rows = members * (2 if directions == 2 else 1), (B, T) if batch_first else (T, B)
        lengths = batch_sizes = None
        if mode == "lengths":
            lengths = torch.tensor(([T, 0, 1, T - 1, 2, T] * B)[:B])
        if mode == "packed":
            batch_sizes = torch.tensor([B, *(max(1, B - t + 1 - t % 2) for t in range(1, T))])
            rows = (int(batch_sizes.sum()),)
        units = [numbers(R, 3, H)] if cell.peephole else []
        if cell.layer_norm:  # with gains of about 1
            units.append((numbers(R, 6, H) + torch.tensor([1.0] * 5 + [0.0])[:, None]).to(dtype).double())
        self.dtype = dtype
        self.what = (
            f"{dtype} T={T} B={B} H={H} {directions} {members} {K} {mode} {batch_first} {resets} {states} {cell} {masks}"
        )
        self.given = LayerCall(
            x=numbers(*rows, I) if I else numbers(*rows, R * 4 * H, scale=scale * max(scale, 1)),
            h0=numbers(R, B, K or H) if states else None,
            c0=numbers(R, B, H) if states else None,
            w_ih=numbers(R * 4 * H, I) if I else None,
            w_hh=numbers(R * 4 * H, H, scale=scale if I else scale * H**-0.5 * 2),
            b_ih=numbers(R * 4 * H) if bias and I else None,
            b_hh=numbers(R * 4 * H) if bias else None,
            w_h0=numbers(R * 4 * H, K) if K else None,
            units=torch.cat(units, 1) if units else None,
            lengths=lengths,
            batch_sizes=batch_sizes,
            resets=torch.rand(rows, generator=g) < 0.4 if resets else None,
            seed=torch.tensor([123456789012]) if any(cell.zoneout) and masks else None,
            directions=directions,
            batch_first=batch_first,
            save=True,
            engine="reference",
            recompute=False,
            cell=cell.relative,
        )
        self.cotangents = [numbers(*rows, R * H), numbers(R, B, H), numbers(R, B, H)]

    def call(self, engine: str = "reference", dtype: torch.dtype = torch.float64, **options: Any) -> LayerCall:
        """By an engine, with inputs that are leaves of their own in ``dtype``; for the kernels, on their device."""
        if engine == "triton":
            skip_unless_it_compiles(dtype)
        return moved(self.given._replace(engine=engine, **options), DEVICE if engine == "triton" else "cpu", dtype)

    def ours(self) -> dict[str, Tensor]:
        """What the kernels make of it."""
        return results(self.call("triton", self.dtype), self.cotangents)

    def loops(self, dtype: torch.dtype, tf32: bool = False) -> dict[str, Tensor]:
        """What the readable loop makes of it, in any dtype; with ``tf32``, products of operands rounded to TF32."""
        with AsTF32() if tf32 else nullcontext():
            return results(self.call("loop", dtype), self.cotangents)

    def add(self, rule: Rule, tf32: bool = False) -> None:
        """Judge what the kernels make of it. ``tf32``: for them, fp32 is TF32."""
        found = self.ours(), self.loops(self.dtype, tf32 and self.dtype == torch.float32), self.loops(torch.float64)
        rule.add(self.what, list(found[0]), *(list(r.values()) for r in found))

    def check_halves(self) -> None:
        """The kernels make of a sequence in two halves what they make of it as a whole."""
        whole, n = self.call("triton", self.dtype), self.given.rows.T // 2
        y, h_n, c_n, _, _ = recurrence.forward(whole)
        y1, h1, c1, _, _ = recurrence.forward(whole._replace(x=whole.x[:n]))
        y2, h2, c2, _, _ = recurrence.forward(whole._replace(x=whole.x[n:], h0=h1, c0=c1))
        # Not bit for bit: the input GEMM's rounding depends on its size, and c crosses the cut in dtype.
        close = {"rtol": 0, "atol": 4 * torch.finfo(self.dtype).eps}
        for halves, expected in ((torch.cat((y1, y2)), y), (h2, h_n), (c2, c_n)):
            torch.testing.assert_close(halves, expected, **close)


def moved(call: LayerCall, device: str, dtype: torch.dtype) -> LayerCall:
    """The call on a device, with inputs that are leaves of their own in ``dtype``."""

    def leaf(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor) or name == "batch_sizes":
            return t
        return t.detach().to(device, dtype, copy=True).requires_grad_() if t.is_floating_point() else t.to(device)

    return LayerCall(*map(leaf, LayerCall._fields, call))


def small_call(engine: str = "reference", save: bool = True, recompute: bool = False, **options: Any) -> LayerCall:
    """In fp64, with so few numbers that finite differences take little time."""
    return Problem(**{"T": 3, "B": 2, "I": 2, "H": 3} | options).call(engine, save=save, recompute=recompute)


def inputs(call: LayerCall) -> dict[str, Tensor]:
    """What gradients are taken by."""
    return {name: t for name, t in zip(ops.INPUTS[: ops.N_INPUTS], call, strict=False) if t is not None}


def results(call: LayerCall, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """y, h_n, c_n and the gradients by all inputs; engine "loop": by the readable loop, under autograd."""
    by = inputs(call)
    outputs = reference.layer(call) if call.engine == "loop" else ops.layer(call)[:3]
    grads = torch.autograd.grad(outputs, list(by.values()), [c.to(call.x) for c in cotangents])
    names = ("y", "h_n", "c_n", *(f"d{name}" for name in by))
    return {name: t.detach().cpu() for name, t in zip(names, (*outputs, *grads), strict=True)}


def rounded(x: Tensor) -> Tensor:
    """x rounded to TF32, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class Product(torch.autograd.Function):
    """h @ w^T in TF32; so is its gradient by h, as in the recurrence."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return rounded(h) @ rounded(w).t()

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return rounded(da) @ rounded(w), da.t() @ h


class AsTF32(TorchFunctionMode):
    """Linear layers are computed in TF32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        h, w, *bias = args
        return sum(filter(torch.is_tensor, bias), Product.apply(h, w))


def check_ops(call: LayerCall, *utils: Sequence[str]) -> None:
    """torch's own checks of both ops: all, or those named for the one and for the other."""
    forward, backward = ({"test_utils": names} for names in utils) if utils else ({}, {})
    torch.library.opcheck(ops.layer_forward, (*call,), **forward)
    with torch.no_grad():
        y, h_n, c_n, gates, c_all = ops.layer_forward(*call)
    assert (gates.numel() == 0) == call.recompute
    needs = [t is not None for t in call[: ops.N_INPUTS]]
    torch.library.opcheck(ops.layer_backward, (y, h_n, c_n, *call, y, gates, c_all, needs), **backward)
