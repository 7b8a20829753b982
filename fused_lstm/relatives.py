"""The steps of the LSTM's relatives in plain PyTorch: forwards, to be read, and backwards, by hand (docs/math.md).

``units`` (R, n, H) holds the parameters of the cell itself: p_i, p_f, p_o of a peephole; then, of a norm, the gains of the
recurrent product for i, f, g, o, and gain and bias of the cell state's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import ALIGNMENT, LayerCall, Rows, accumulator_dtype
from .cell import EPS, Relative
from .gemm import batched

ROUNDS = 7  # of Philox; Salmon et al. 2011 find no fault from 7 on
WORD = 0xFFFFFFFF


class Zoneout(NamedTuple):
    """How much of h and of c before a step is there after it, from 0 to 1: (N, R, H) each."""

    h: Tensor
    c: Tensor

    def at(self, rows: slice | Tensor, r: int | slice) -> Zoneout:
        return Zoneout(self.h[rows, r], self.c[rows, r])


def zoneout(call: LayerCall, relative: Relative, rows: Rows, like: Tensor) -> Zoneout | None:
    """Of all steps, in ``like``'s dtype: masks if there is a seed, else what they are on average."""
    p, (R, H, T, B) = (relative.zoneout_h, relative.zoneout_c), (call.R, call.H, rows.T, rows.B)
    if not relative.zoned:
        return None
    if call.seed is None:
        return Zoneout(*(like.new_full((), q).expand(like.shape[0], R, H) for q in p))
    # One draw gives four words: of h and of c, at two times. It is counted by units as if H were a multiple of 16, to which
    # the kernels' H is padded. In blocks that a CPU's caches hold.
    count, limits = torch.arange((T + 1) // 2 * B * R, device=like.device), [round(q * 2**32) for q in p] * 2
    index = (count[:, None] * (H + -H % ALIGNMENT) + torch.arange(H, device=like.device)).flatten()
    words = (philox(call.seed, block) for block in index.split(2**16))
    masks = torch.cat([torch.stack([w < limit for w, limit in zip(four, limits, strict=True)]) for four in words], 1)
    t, b = rows.times_and_batch_rows(like.shape[0], like.device)
    in_time = masks.view(2, 2, -1, B, R, H).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)
    return Zoneout(*(mask.index_select(0, t * B + b).to(like.dtype) for mask in in_time))


def philox(seed: Tensor, index: Tensor) -> list[Tensor]:
    """Four random numbers below 2^32 for each index, int64: Philox4x32 (Salmon et al. 2011) keyed by a seed (1,) int64."""
    c0, c1, c2, c3 = index & WORD, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # may wrap, which leaves their bits right
        c0 = (b >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = (a >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = b, a  # by their lower halves
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1 & WORD, c2, c3 & WORD]


def step(
    given: Tensor,  # (..., 4, H) pre-activations but for the recurrent product
    recurrent: Tensor,  # (..., 4, H) that product
    h: Tensor,  # (..., H)
    c: Tensor,  # (..., H)
    relative: Relative,
    units: Tensor | None,  # (..., n, H)
    zone: Zoneout | None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The gates i, f, g, o, and h and c after the step: the seven lines of :func:`fused_lstm.reference.cell`, and more."""
    peepholes, gains, norm_c = parts(relative, units)
    if relative.norm:
        recurrent = F.layer_norm(recurrent, recurrent.shape[-2:], eps=EPS) * gains
    a_i, a_f, a_g, a_o = (given + recurrent).unbind(-2)
    if relative.peephole:  # gates that are read before the cell changes see it as it was
        a_i, a_f = a_i + peepholes[0] * c, a_f + peepholes[1] * c
    f = torch.sigmoid(a_f)  # 1. forget gate
    g = torch.tanh(a_g)  # 2. candidate
    i = torch.sigmoid(a_i)  # 3. update (input) gate
    new_c = shown = f * c + i * g  # 4. cell update
    if relative.norm:
        shown = F.layer_norm(new_c, new_c.shape[-1:], eps=EPS) * norm_c[0] + norm_c[1]
    if relative.norm == "state":
        new_c = shown
    tanh_c = torch.tanh(shown)  # 5. the memory, squashed
    if relative.peephole:
        a_o = a_o + peepholes[2] * new_c
    o = torch.sigmoid(a_o)  # 6. output gate
    new_h = o * tanh_c  # 7. hidden state
    if zone is not None:
        new_h, new_c = torch.lerp(new_h, h, zone.h), torch.lerp(new_c, c, zone.c)
    return (i, f, g, o), new_h, new_c


def parts(relative: Relative, units: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[Tensor, ...]]:
    """Peepholes, gains of the recurrent product (..., 4, H), gain and bias of the cell state's norm; as far as there are."""
    if units is None:
        return (), None, ()
    n = 3 * relative.peephole
    rows = units.unbind(-2)
    return rows[:n], units[..., n : n + 4, :], rows[n + 4 :]


def gates_of(call: LayerCall, rows: Rows, given: Tensor, h_prev: Tensor, c_prev: Tensor) -> Tensor:
    """The activated gates (N, R, 4, H) of all steps at once, from the states before them."""
    relative = Relative.of(call.cell)
    recurrent = torch.bmm(h_prev.transpose(0, 1), call.w_hh.view(call.R, 4 * call.H, call.H).mT).transpose(0, 1)
    given = given if call.b_hh is None else given + call.b_hh.view(given.shape[1:])
    return torch.stack(step(given, recurrent.view(given.shape), h_prev, c_prev, relative, call.units, None)[0], 2)


class Backward:
    """The backward pass of a relative: what its steps need of the forward pass, for all of them at once; a step; and what is
    left to do after the last."""

    def __init__(
        self,
        call: LayerCall,
        rows: Rows,
        gates: Tensor,  # (N, R, 4, H) activated
        h_prev: Tensor,  # (N, R, H) before each step, and the next
        c_prev: Tensor,
    ) -> None:
        R, H, dtype = call.R, call.H, accumulator_dtype(gates.dtype)
        self.call, self.relative, self.c_prev = call, Relative.of(call.cell), c_prev.to(dtype)
        self.peepholes, self.gains, norm_c = parts(self.relative, None if call.units is None else call.units.to(dtype))
        i, f, g, _ = gates.to(dtype).unbind(2)
        self.c = self.shown = f * self.c_prev + i * g  # before a norm and zoneout
        self.passed: Tensor | None = None  # (R, B, H): by h0 of zoneout, where the kernels did not add it to dh_0
        if self.relative.norm:
            w = call.w_hh.view(R, 4 * H, H)
            products = batched(h_prev.transpose(0, 1), w.mT, self.c.new_empty(R, h_prev.shape[0], 4 * H))
            products = products.transpose(0, 1).unflatten(2, (4, H)).contiguous()
            self.recurrent, self.c_norm = Normalized(products, 2), Normalized(self.c, 1)
            self.gain_c = norm_c[0]
            self.shown = self.c_norm.value * norm_c[0] + norm_c[1]
            self.dshown = torch.zeros_like(self.c_prev)

    def step(
        self, at: slice | Tensor, r: slice, dh: Tensor, dc: Tensor, da: Tensor, dshown_dh: Tensor, f: Tensor,
        valid: Tensor | None, zone: Zoneout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """From the gradients by h and c after the step: those by the recurrent product and by c before. ``da`` holds the
        derivatives of the cell state by the pre-activations of i, f, g, and of h by that of o, and is given the gradients by
        all four."""
        norm, dc_next = self.relative.norm, dc
        if zone is not None:
            dc = torch.addcmul(dc, dc, zone.c, value=-1)
        da[:, :, 3].mul_(dh)
        if self.relative.peephole:
            dc = torch.addcmul(dc, da[:, :, 3], self.peepholes[2][r])
        if norm == "output":
            dshown = dh * dshown_dh
        else:
            dc = dshown = torch.addcmul(dc, dh, dshown_dh)
        if norm:
            self.dshown[at, r] = dshown if valid is None else torch.where(valid, dshown, 0)
            through = self.c_norm.backward(dshown * self.gain_c[r], at, r)[0]
            dc = through.add_(dc) if norm == "output" else through
        da[:, :, :3].mul_(dc[:, :, None])
        dc = dc * f
        if self.relative.peephole:
            dc.addcmul_(da[:, :, 0], self.peepholes[0][r]).addcmul_(da[:, :, 1], self.peepholes[1][r])
        if zone is not None:
            dc.addcmul_(dc_next, zone.c)
        return self.recurrent.backward(da * self.gains[r], at, r)[0] if norm else da, dc

    def by_products(self, dgates: Tensor) -> list[Tensor]:
        """Of each recurrence (N, 4H), gradients by the recurrent products of all steps; and those by their gains."""
        if not self.relative.norm:
            return list(dgates.flatten(2).unbind(1))
        found = [
            self.recurrent.backward(d, slice(None), r, self.gains[r]) for r, d in enumerate(self._wide(dgates).unbind(1))
        ]
        self.dgains = [by_gains for _, by_gains, _ in found]
        return [by_product.flatten(1).to(dgates.dtype) for by_product, _, _ in found]

    def by_units(self, dgates: Tensor) -> Tensor | None:
        """(R, n, H): gradients by the cell's own parameters, from those by all pre-activations (N, R, 4, H)."""
        if self.call.units is None:
            return None
        dgates, found = self._wide(dgates), []
        if self.relative.peephole:
            new_c = self.shown if self.relative.norm == "state" else self.c
            found += [(dgates[:, :, k] * c).sum(0) for k, c in ((0, self.c_prev), (1, self.c_prev), (3, new_c))]
        if self.relative.norm:
            found += torch.stack(self.dgains).unbind(1)
            found += [(self.dshown * self.c_norm.value).sum(0), self.dshown.sum(0)]
        return torch.stack(found, 1).to(self.call.units.dtype)

    def _wide(self, dgates: Tensor) -> Tensor:
        return dgates.to(self.c.dtype)


class Normalized:
    """A norm over the last ``dims`` dimensions of a tensor, and the gradients through it."""

    def __init__(self, given: Tensor, dims: int) -> None:
        self.shape = given.shape[-dims:]
        value, mean, self.rstd = torch.native_layer_norm(given, self.shape, None, None, EPS)
        # torch's formula of the gradient cancels where the mean is large.
        self.centered, self.mean = torch.sub(given, mean, out=value), torch.zeros_like(mean)

    @property
    def value(self) -> Tensor:
        return self.centered * self.rstd

    def backward(self, grad: Tensor, at: slice | Tensor, r: slice | int, gain: Tensor | None = None) -> tuple[Tensor, ...]:
        """Gradients by what was given and, if there is one, by the gain that its normalized values were multiplied by."""
        x, mean, rstd = (t[at, r].contiguous() for t in (self.centered, self.mean, self.rstd))
        needs = [True, gain is not None, False]
        return torch.ops.aten.native_layer_norm_backward(grad.contiguous(), x, self.shape, mean, rstd, gain, None, needs)
