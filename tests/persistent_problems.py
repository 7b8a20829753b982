"""Random recurrences for the persistent kernels: run by them in forked processes, and by plain torch in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gluon_interpreter
import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, Rule
from forked import Delays, Program, run_forked
from fused_lstm.kernels.buffers import Backward, Forward
from fused_lstm.kernels.rows import Sequences
from torch import Tensor

from fused_lstm.cell import EPS, Cell, Relative
from fused_lstm.launch import persistent
from fused_lstm.launch.schedule import CELLS
from fused_lstm.relatives import Normalized, philox

TORCHS = Cell()


def rounded(x: Tensor, tf32: bool) -> Tensor:
    """x rounded to TF32, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if tf32 else x


def buffers(kind: type, tensors: dict[str, Any]) -> Any:
    """A Forward or Backward of tensors named without their ending."""
    return kind(*(tensors.get(field.removesuffix("_ptr")) for field in kind._fields))


class Product(torch.autograd.Function):
    """h @ w^T, whose gradient by h has the precision of the product itself, as in the recurrence."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, tf32: bool) -> Tensor:
        ctx.save_for_backward(h, w)
        ctx.tf32 = tf32
        return rounded(h, tf32) @ rounded(w, tf32).t()

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor, None]:
        h, w = ctx.saved_tensors
        return rounded(da, ctx.tf32) @ rounded(w, ctx.tf32), da.t() @ h, None


class Problem:
    """Inputs of one recurrence: numbers of ``dtype``, held in fp64."""

    def __init__(
        self,
        dtype: torch.dtype,
        T: int = 4,
        B: int = 3,
        H: int = 32,
        directions: int = 1,
        members: int = 1,
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

        R = members * (2 if directions == 2 else 1)
        self.what = f"{dtype} T={T} B={B} H={H} {directions} {members} {mode} {resets} {states} {cell} {masks}"
        self.relative = Relative.of(cell.relative)
        self.seed = torch.tensor([123456789012]) if self.relative.zoned and masks else None
        self.dtype, self.T, self.B, self.H, self.R, self.directions = dtype, T, B, H, R, directions
        self.lengths, starts = None, None
        self.strides = (1, T) if batch_first else (B, 1)
        N = T * B
        if mode == "lengths":
            self.lengths = torch.tensor(([T, 0, 1, T - 1, 2, T] * B)[:B])
        if mode == "packed":
            sizes = torch.tensor([B, *(max(1, B - t) for t in range(1, T))])
            self.lengths = (torch.arange(B) < sizes[:, None]).sum(0)
            starts, N = torch.cumsum(sizes, 0) - sizes, int(sizes.sum())
        lengths = torch.full((B,), T) if self.lengths is None else self.lengths
        self.starts, self.N = starts, N
        self.resets = torch.rand(N, generator=g) < 0.4 if resets else None
        self.inputs = {
            "gates": numbers(N, R, 4, H, scale=scale * max(scale, 1)),
            "w_hh": numbers(R, 4, H, H, scale=scale * H**-0.5 * 2),
            "b_hh": numbers(R, 4, H) if bias else None,
            "h0": numbers(R, B, H) if states else None,
            "c0": numbers(R, B, H) if states else None,
            "units": numbers(R, 3, H) if cell.peephole else None,
        }
        if cell.layer_norm:  # with gains of about 1
            norms = (numbers(R, 6, H) + torch.tensor([1.0] * 5 + [0])[:, None]).to(dtype).double()
            self.inputs["units"] = torch.cat([u for u in (self.inputs["units"], norms) if u is not None], 1)
        self.cotangents = {"dy": numbers(N, R, H), "dhn": numbers(R, B, H), "dcn": numbers(R, B, H)}
        # for each recurrence, data rows (T, B) of the steps, which rows have the step, and which keep the state before it
        self.maps = [self._map(r, lengths) for r in range(R)]

    def _map(self, r: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backwards = self.directions == -1 or (self.directions == 2 and r % 2 == 1)
        s, b = torch.arange(self.T)[:, None], torch.arange(self.B)
        has = s < lengths
        t = lengths - 1 - s if backwards else s.expand(self.T, self.B)
        t = torch.where(has, t, 0)
        at = self.starts[t] + b if self.starts is not None else t * self.strides[0] + b * self.strides[1]
        at = torch.where(has, at, 0)
        keep = has.clone()
        if self.resets is not None and backwards:
            keep[1:] &= ~self.resets[at[:-1]]
        elif self.resets is not None:
            keep &= ~self.resets[at]
        return at, has, keep

    def _zoneout(self, r: int, dtype: torch.dtype) -> Callable[..., Tensor]:
        """How a state of recurrence r comes from those before and after step s without zoneout; of h (0) or of c (1)."""
        p = self.relative.zoneout_h, self.relative.zoneout_c
        lengths = torch.full((self.B,), self.T) if self.lengths is None else self.lengths
        backwards = self.directions == -1 or (self.directions == 2 and r % 2 == 1)

        def kept(s: int, which: int) -> Tensor | float:
            if self.seed is None:
                return p[which]
            t = torch.clamp(lengths - 1 - s if backwards else lengths * 0 + s, min=0)[:, None]
            index = ((t // 2 * self.B + torch.arange(self.B)[:, None]) * self.R + r) * self.H + torch.arange(self.H)
            words = philox(self.seed, index)
            return (torch.where(t % 2 == 1, words[2 + which], words[which]) < round(p[which] * 2**32)).to(dtype)

        def zoned(s: int, which: int, before: Tensor, after: Tensor) -> Tensor:
            k = kept(s, which)
            return k * before + (1 - k) * after

        return zoned

    def _before(self, after: Tensor, first: Tensor | None) -> Tensor:
        """The states (N, R, H) before each step."""
        found = torch.zeros_like(after)
        for r, (rows, has, keep) in enumerate(self.maps):
            state = torch.zeros_like(after[: self.B, 0]) if first is None else first[r]
            for s in range(self.T):
                found[rows[s][has[s]], r] = torch.where(keep[s, :, None], state, 0)[has[s]]
                state = after[rows[s], r]
        return found

    def reference(self, dtype: torch.dtype, tf32: bool = False) -> dict[str, Tensor]:
        """Results and gradients by autograd, computed in ``dtype``; with ``tf32``, products of operands rounded to TF32."""
        given = {k: None if v is None else v.to(dtype).requires_grad_() for k, v in self.inputs.items()}
        y = torch.zeros(self.N, self.R, self.H, dtype=dtype)
        c_all, ends = torch.zeros_like(y), []
        for r, (rows, has, keep) in enumerate(self.maps):
            zero, zoned = torch.zeros(self.B, self.H, dtype=dtype), self._zoneout(r, dtype)
            h, c = (zero if given[k] is None else given[k][r] for k in ("h0", "c0"))
            for s in range(self.T):
                h_before, c_before = (torch.where(keep[s, :, None], t, 0) for t in (h, c))
                product = Product.apply(h_before, given["w_hh"][r].flatten(0, 1), tf32)
                peepholes, norms = self._units(given["units"], r)
                if len(norms):
                    product = F.layer_norm(product, product.shape[1:], norms[:4].flatten(), eps=EPS)
                a = given["gates"][rows[s], r] + product.view(-1, 4, self.H)
                if given["b_hh"] is not None:
                    a = a + given["b_hh"][r]
                i, f, g, o = a.unbind(1)
                if len(peepholes):
                    i, f = i + peepholes[0] * c_before, f + peepholes[1] * c_before
                c_new = shown = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
                if len(norms):
                    shown = F.layer_norm(c_new, c_new.shape[1:], norms[4], norms[5], EPS)
                    c_new = shown if self.relative.norm == "state" else c_new
                if len(peepholes):
                    o = o + peepholes[2] * c_new
                h_new = o.sigmoid() * shown.tanh()
                if self.relative.zoned:
                    h_new, c_new = zoned(s, 0, h_before, h_new), zoned(s, 1, c_before, c_new)
                h, c = (torch.where(has[s, :, None], new, old) for new, old in ((h_new, h), (c_new, c)))
                at = rows[s][has[s]]
                y = y.index_put((at, torch.tensor(r)), h_new[has[s]])
                c_all = c_all.index_put((at, torch.tensor(r)), c_new[has[s]])
            ends.append((h, c))
        hn, cn = (torch.stack(e) for e in zip(*ends, strict=True))
        wanted = {"dgates": given["gates"], "dw_hh": given["w_hh"], "dc0": given["c0"], "dh0": given["h0"]}
        wanted |= {"dunits": given["units"]} if self.relative.norm else {}
        wanted = {k: v for k, v in wanted.items() if v is not None}
        cotangents = [t.to(dtype) for t in self.cotangents.values()]
        grads = torch.autograd.grad((y, hn, cn), list(wanted.values()), cotangents, allow_unused=True)
        results = {"y": y, "hn": hn, "cn": cn, **dict(zip(wanted, grads, strict=True))}
        if self.relative.norm:  # of the cell state's norm
            results["dunits"] = results["dunits"][:, -2:]
        return {k: v.detach() for k, v in results.items() if v is not None}

    def _units(self, units: Tensor | None, r: int) -> tuple[Tensor, Tensor]:
        """Peepholes and norms' parameters of recurrence r, as far as there are."""
        own = torch.zeros(0) if units is None else units[r]
        return own[: 3 * self.relative.peephole], own[3 * self.relative.peephole :]

    def add(self, rule: Rule, config: persistent.PersistentConfig) -> None:
        """Judge what the kernels make of it; fp32 is TF32 to them."""
        ours = self.run(config)
        torchs, exact = self.reference(self.dtype, self.dtype == torch.float32), self.reference(torch.float64)
        rule.add(self.what, list(ours), *([r[k] for k in ours] for r in (ours, torchs, exact)))

    def tensors(self) -> dict[str, Tensor | None]:
        given = {k: None if v is None else v.to(self.dtype) for k, v in (self.inputs | self.cotangents).items()}
        return given | {"seed": self.seed}

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.lengths, self.starts, None if self.resets is None else self.resets.view(torch.uint8))

    def forward(
        self, config: persistent.PersistentConfig, save: bool = True, given: dict[str, Any] | None = None
    ) -> Forward:
        """The buffers after the forward kernel; before it, what it is to write holds NaN."""
        t = self.tensors() | (given or {})
        new = {k: (n, self.R, self.H) for k, n in (("h", self.N), ("c", self.N))}
        new |= {k: (self.R, self.B, self.H) for k in ("hn", "cn")}
        out = {k: torch.full(shape, torch.nan, dtype=self.dtype) for k, shape in new.items()}
        if not save:
            del out["c"]
        return self._launch("forward", buffers(Forward, {**t, "gates": t["gates"].clone(), **out}), config)

    def backward(
        self, config: persistent.PersistentConfig, forward: Forward, given: dict[str, Any] | None = None
    ) -> Backward:
        """The buffers after the backward kernel, from those of the forward one."""
        new = {"dgates": (self.N, self.R, 4, self.H), "h_prev": (self.N, self.R, self.H), "dc0": (self.R, self.B, self.H)}
        out = {k: torch.full(shape, torch.nan, dtype=self.dtype) for k, shape in new.items()}
        if self.relative.zoned:
            out["passed"] = torch.full(new["dc0"], torch.nan)
        saved = {k.removesuffix("_ptr"): t for k, t in forward._asdict().items()}
        if self.relative.norm:
            i, f, g, _ = forward.gates_ptr.float().unbind(2)
            c_prev = self._before(forward.c_ptr, forward.c0_ptr).float()
            c, products = Normalized(f * c_prev + i * g), Normalized(self._products(forward).float())
            out |= {"h_prev": None, "dshown": torch.zeros_like(c_prev)}
            saved |= {"c_prev": c_prev, "c_centered": c.centered, "c_rstd": c.rstd}
            saved |= {"products": products.centered, "products_rstd": products.rstd}
        return self._launch("backward", buffers(Backward, {**self.tensors(), **(given or {}), **saved, **out}), config)

    def _products(self, forward: Forward) -> Tensor:
        """The products (N, R, 4H) of the states before each step with W_hh, in fp64."""
        h_prev = self._before(forward.h_ptr, forward.h0_ptr).double()
        return torch.einsum("nrk,rmk->nrm", h_prev, forward.w_hh_ptr.flatten(1, 2).double()).contiguous()

    def _launch(self, kernel: str, buffers: Any, config: persistent.PersistentConfig) -> Any:
        """Run a kernel on copies of the buffers, where there is a GPU there, and return them."""
        buffers = type(buffers)(*(None if t is None else t.to(DEVICE) for t in buffers))
        sequences = Sequences(*(None if t is None else t.to(DEVICE) for t in self.sequences))
        size = self.T, self.B, *self.strides
        persistent.run(kernel, buffers, sequences, size, self.directions, config, self.relative)
        return type(buffers)(*(None if t is None else t.cpu() for t in buffers))

    def run(self, config: persistent.PersistentConfig) -> dict[str, Tensor]:
        """What :meth:`reference` returns, by the kernels; the gradients of W_hh and h0 by the products that follow them."""
        f = self.forward(replace(config, form="whole") if config.form == "split" else config)
        b = self.backward(config, f)
        results = {"y": f.h_ptr, "hn": f.hn_ptr, "cn": f.cn_ptr, "dgates": b.dgates_ptr, "dc0": b.dc0_ptr}
        flat, h_prev = b.dgates_ptr.flatten(2).double(), b.h_prev_ptr
        if self.relative.norm:
            dgain = (b.dshown_ptr * b.c_centered_ptr * b.c_rstd_ptr).sum(0)
            results["dunits"] = torch.stack([dgain, b.dshown_ptr.sum(0)], 1).to(self.dtype)
            h_prev = self._before(f.h_ptr, f.h0_ptr)
            products, gains = self._products(f).requires_grad_(), f.units_ptr[:, -6:-2].flatten(1).double()
            (flat,) = torch.autograd.grad(F.layer_norm(products, products.shape[2:], eps=EPS) * gains, products, flat)
        dw = torch.stack([flat[:, r].t() @ h_prev[:, r].double() for r in range(self.R)])
        results["dw_hh"] = dw.view(self.R, 4, self.H, self.H).to(self.dtype)
        if f.h0_ptr is not None:
            dh0 = []
            for r, (rows, _, keep) in enumerate(self.maps):
                through = torch.where(keep[0, :, None], flat[rows[0], r] @ f.w_hh_ptr[r].flatten(0, 1).double(), 0)
                if b.passed_ptr is not None:
                    through += b.passed_ptr[r]
                without = torch.zeros(self.B, dtype=torch.bool) if self.lengths is None else self.lengths == 0
                dh0.append(torch.where(without[:, None], self.cotangents["dhn"][r], through))
            results["dh0"] = torch.stack(dh0).to(self.dtype)
        else:
            del results["dc0"]
        return results


def interpret(
    monkeypatch: pytest.MonkeyPatch,
    delays: Delays | None = None,
    timeout: float = 60.0,
    modules: dict[str, Any] | None = None,
) -> list[Program]:
    """Launches of the persistent kernels run in the interpreter from now on, a process for each program.

    Where there is a GPU, they run there. Returns the list that their grids are added to. ``modules`` are those of
    gluon_interpreter.interpreted(), with a fault.
    """
    grids: list[Program] = []
    if DEVICE != "cpu":
        real = persistent.launch_once
        monkeypatch.setattr(
            persistent, "launch_once", lambda name, grid, *more: (grids.append(grid), real(name, grid, *more))
        )
        return grids
    modules = modules or gluon_interpreter.interpreted()
    found = {name: value for module in modules.values() for name, value in vars(module).items()}

    def launch(name: str, grid: Program, buffers: Any, sequences: Sequences, numbers: tuple, cut: Any, _: bool) -> None:
        grids.append(grid)
        kernel, cell = found[persistent.KERNELS[name].__name__], CELLS[name.split()[0]]
        forked(kernel, grid, (buffers, sequences, *numbers, cell, cut), delays, timeout)

    monkeypatch.setattr(persistent, "launch_once", launch)
    return grids


def forked(kernel: Any, grid: Program, args: tuple, delays: Delays | None = None, timeout: float = 60.0) -> None:
    """Run an interpreted kernel in a process for each program."""

    class Run:
        __name__ = kernel.__name__

        def __getitem__(self, _: Program) -> Callable[..., None]:
            gluon_interpreter.prepare()
            return lambda *args, **_: kernel[(1, 1, 1)](*args)

    run_forked(Run(), grid, args, {}, delays=delays, timeout=timeout)
