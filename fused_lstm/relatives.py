"""The steps of the LSTM's relatives in plain PyTorch: forwards, to be read, and backwards, by hand (docs/math.md).

``units`` (R, n, H) holds the parameters of the cell itself: p_i, p_f, p_o of a peephole; then, of a norm, the gains of the
recurrent product for i, f, g, o, and gain and bias of the cell state's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import ALIGNMENT, LayerCall, Rows, accumulator_dtype, forward_mode, no_autocast
from .cell import EPS, Relative
from .gemm import batched, linear, outer, product, tf32_as_cudnn

if TYPE_CHECKING:
    from .reference import Group

ROUNDS = 7  # of Philox; Salmon et al. 2011 find no fault from 7 on
WORD = 0xFFFFFFFF


class Zoneout(NamedTuple):
    """How much of h and of c before a step is there after it, from 0 to 1: (N, R, H) each."""

    h: Tensor
    c: Tensor

    def at(self, rows: slice | Tensor, r: int) -> Zoneout:
        return Zoneout(self.h[rows, r], self.c[rows, r])


def zoneout(
    call: LayerCall, relative: Relative, rows: Rows, like: Tensor, masks: list[Tensor] | None = None
) -> Zoneout | None:
    """Of all steps, in ``like``'s dtype: masks if there is a seed, else what they are on average."""
    if not relative.zoned:
        return None
    if call.seed is None:
        p, size = (relative.zoneout_h, relative.zoneout_c), (like.shape[0], *call.sizes)
        return Zoneout(*(like.new_full((), q).expand(size) for q in p))
    return Zoneout(*(mask.to(like.dtype) for mask in masks or drawn(call, relative, rows, like.shape[0])))


def drawn(call: LayerCall, relative: Relative, rows: Rows, N: int) -> list[Tensor]:
    """Masks by ``call.seed``: which units keep their h, and which their c, (N, R, H) bool each."""
    p, (R, H), T, B, device = (relative.zoneout_h, relative.zoneout_c), call.sizes, rows.T, rows.B, call.seed.device
    # One draw gives four words: of h and of c, at two times. It is counted by units as if H were a multiple of 16, to which
    # the kernels' H is padded. In blocks that a CPU's caches hold.
    count, limits = torch.arange((T + 1) // 2 * B * R, device=device), [round(q * 2**32) for q in p] * 2
    index = (count[:, None] * (H + -H % ALIGNMENT) + torch.arange(H, device=device)).flatten()
    words = (philox(call.seed, block) for block in index.split(2**16))
    masks = torch.cat([torch.stack([w < limit for w, limit in zip(four, limits, strict=True)]) for four in words], 1)
    t, b = rows.times_and_batch_rows(N, device)
    in_time = masks.view(2, 2, (T + 1) // 2, B, R, H).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)
    return [mask.index_select(0, t * B + b) for mask in in_time]


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
        recurrent = normalized(recurrent, 2) * gains
    a_i, a_f, a_g, a_o = (given + recurrent).unbind(-2)
    if relative.peephole:  # gates that are read before the cell changes see it as it was
        a_i, a_f = a_i + peepholes[0] * c, a_f + peepholes[1] * c
    f = torch.sigmoid(a_f)  # 1. forget gate
    g = torch.tanh(a_g)  # 2. candidate
    i = torch.sigmoid(a_i)  # 3. update (input) gate
    new_c = shown = f * c + i * g  # 4. cell update
    if relative.norm:
        shown = normalized(new_c, 1) * norm_c[0] + norm_c[1]
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


def normalized(x: Tensor, dims: int) -> Tensor:
    """LN over the last dimensions. Of torch's own, third derivatives and reverse over forward mode are wrong."""
    if not torch.is_grad_enabled() and not forward_mode():
        return F.layer_norm(x, x.shape[-dims:], eps=EPS)
    wide, over = x.to(accumulator_dtype(x.dtype)), tuple(range(-dims, 0))
    wide = wide - wide.mean(over, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + EPS)).to(x.dtype)


def normed_input(x: Tensor, w: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """LN(x w^T) gain + bias for x (..., I), w (4H, I), gain and bias (4H,)."""
    y = normalized(F.linear(x, w), 1) * gain
    return y if bias is None else y + bias


class NormedInput(torch.autograd.Function):
    """:func:`normed_input` for plain calls: by torch's kernels, but for a gradient that is to have one itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        with tf32_as_cudnn(x):
            products = linear(x, w)
        y, *statistics = torch.native_layer_norm(products, w.shape[:1], gain, bias, EPS)
        ctx.save_for_backward(x, w, gain, bias, products, *statistics)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, gain, bias, products, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            by_all = torch.func.vjp(normed_input, *[t for t in (x, w, gain, bias) if t is not None])[1](grad)
            return *by_all, *[None] * (4 - len(by_all))
        by_x, by_w, *by_own = ctx.needs_input_grad
        with no_autocast(x), tf32_as_cudnn(x):
            needs = [by_x or by_w, *by_own]
            by_products, *found = layer_norm_backward(grad, products, w.shape[:1], *statistics, gain, bias, needs)
            flat = None if by_products is None else by_products.reshape(-1, w.shape[0])
            dx = product(flat, w).view_as(x) if by_x else None
            return dx, outer(flat, x.reshape(-1, w.shape[1])) if by_w else None, *found


def parts(relative: Relative, units: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[Tensor, ...]]:
    """Peepholes, gains of the recurrent product (..., 4, H), gain and bias of the cell state's norm; as far as there are."""
    if units is None:
        return (), None, ()
    n = 3 * relative.peephole
    rows = units.unbind(-2)
    return rows[:n], units[..., n : n + 4, :], rows[n + 4 :]


def products_of(call: LayerCall, h_prev: Tensor, dtype: torch.dtype) -> Tensor:
    """The recurrent products (N, R, 4, H) of all steps at once, from the states before them."""
    R, H = call.sizes
    w = call.w_hh.view(R, 4 * H, H)
    if h_prev.is_cpu:
        each = [linear(h.to(dtype).contiguous(), v.to(dtype)) for h, v in zip(h_prev.unbind(1), w, strict=True)]
        products = each[0][:, None] if R == 1 else torch.stack(each, 1)
    else:
        products = batched(h_prev.transpose(0, 1), w.mT, h_prev.new_empty(R, h_prev.shape[0], 4 * H, dtype=dtype))
        products = products.transpose(0, 1).contiguous()
    return products.unflatten(2, (4, H))


def gates_of(call: LayerCall, given: Tensor, h_prev: Tensor, c_prev: Tensor) -> Tensor:
    """The activated gates (N, R, 4, H) of all steps at once, from the states before them."""
    relative = Relative.of(call.cell)
    given = given if call.b_hh is None else given + call.b_hh.view(given.shape[1:])
    recurrent = products_of(call, h_prev, given.dtype)
    return torch.stack(step(given, recurrent, h_prev, c_prev, relative, call.units, None)[0], 2)


class Made(NamedTuple):
    """What the forward pass of the explicit path made for the backward pass, as an attribute of the cell states that it
    saved: who asks for little memory, or moves what was saved, goes without, and the backward pass makes it again."""

    masks: list[Tensor] | None = None
    products: Normalized | None = None


class Backward:
    """The backward pass of a relative: what its steps need of the forward pass, for all of them at once; a step; and what is
    left to do after the last."""

    def __init__(
        self,
        call: LayerCall,
        rows: Rows,
        gates: Tensor | None,  # (N, R, 4, H) activated; None: set before anything is asked of them
        y: Tensor,  # (N, R, H)
        c_all: Tensor,  # (N, R, H)
    ) -> None:
        self.call, self.rows, self.gates, self.y, self.c_all = call, rows, gates, y, c_all
        self.relative, self.dtype = Relative.of(call.cell), accumulator_dtype(c_all.dtype)
        units = None if call.units is None else call.units.to(self.dtype)
        self.peepholes, self.gains, self.norm_c = parts(self.relative, units)
        self.gains = None if self.gains is None else self.gains.flatten(-2)
        self.made: Made = getattr(c_all, "made", Made())
        self.passed: Tensor | None = None  # (R, B, H): by h0 beside the products, where the kernels did not add it to dh_0

    # What follows is made when it is asked for: kernels without norms need none of it, but peepholes' gradients some.

    @cached_property
    def h_prev(self) -> Tensor:
        return self._before(self.y, self.call.h0)

    @cached_property
    def c_prev(self) -> Tensor:
        return self._before(self.c_all, self.call.c0).to(self.dtype)

    def _before(self, after: Tensor, first: Tensor | None) -> Tensor:
        """The states (N, R, H) before each step."""
        each = [self.rows.previous(after, None if first is None else first[r], r) for r in range(self.call.R)]
        return torch.stack(each, 1) if len(each) > 1 else each[0][:, None]

    @cached_property
    def zone(self) -> Zoneout | None:
        return zoneout(self.call, self.relative, self.rows, self.c_all, self.made.masks)

    @cached_property
    def c(self) -> Tensor:
        """The cell state before a norm and zoneout."""
        i, f, g, _ = self.gates.to(self.dtype).unbind(2)
        return f * self.c_prev + i * g

    @cached_property
    def shown(self) -> Tensor:
        """What tanh sees."""
        return torch.addcmul(self.norm_c[1], self.c_norm.value, self.norm_c[0]) if self.relative.norm else self.c

    @cached_property
    def recurrent(self) -> Normalized:
        return self.made.products or Normalized(products_of(self.call, self.h_prev, self.dtype).flatten(2))

    @cached_property
    def c_norm(self) -> Normalized:
        return Normalized(self.c.clone())

    @cached_property
    def dshown(self) -> Tensor:
        """Gradients by the normalized cell state of all steps, for the recurrence to fill in."""
        return torch.zeros_like(self.c)

    def parts(self, group: Group, da: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`step` gets of each step."""
        norms = (self.c_norm, self.recurrent) if self.relative.norm else ()
        given = [group.of(t) for norm in norms for t in norm.parts]
        return *((da[..., 0, :], da[..., 1, :]) if self.relative.peephole else ()), *given

    def step(
        self, r: int | slice, dh: Tensor, dc: Tensor, da: Tensor, da_ifg: Tensor, da_o: Tensor, dshown_dh: Tensor, f: Tensor,
        valid: Tensor | None, kept_c: Tensor | None, *more: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """From the gradients by h and c after the step: those by the recurrent product and by c before. ``da`` (..., 4H)
        holds the derivatives of the cell state by the pre-activations of i, f, g, and the gradient by that of o; it is given
        the gradients by all four, and ``dshown_dh`` those by the normalized cell state, if it is normalized."""
        peephole, norm, _, _ = self.relative
        dc_next = dc
        if kept_c is not None:
            dc = torch.addcmul(dc, dc, kept_c, value=-1)
        if peephole:
            da_i, da_f, *more = more
            dc = torch.addcmul(dc, da_o, self.peepholes[2][r])
        if norm:
            dshown = dshown_dh.mul_(dh) if norm == "output" else torch.addcmul(dc, dh, dshown_dh, out=dshown_dh)
            if valid is not None:
                dshown.masked_fill_(~valid, 0)
            through = self.c_norm.backward(dshown, *more[:3], self.norm_c[0][r], BY_GIVEN)[0]
            dc = through.add_(dc) if norm == "output" else through
        else:
            dc = torch.addcmul(dc, dh, dshown_dh)
        da_ifg.mul_(dc.unsqueeze(-2))
        dc.mul_(f)
        if peephole:
            dc.addcmul_(da_i, self.peepholes[0][r]).addcmul_(da_f, self.peepholes[1][r])
        if kept_c is not None:
            dc.addcmul_(dc_next, kept_c)
        return self.recurrent.backward(da, *more[3:], self.gains[r], BY_GIVEN)[0] if norm else da, dc

    def by_products(self, dgates: Tensor) -> list[Tensor]:
        """Of each recurrence (N, 4H), gradients by the recurrent products of all steps; and those by their gains."""
        dgates = dgates.flatten(2)
        if not self.relative.norm:
            return list(dgates.unbind(1))
        norm, found = self.recurrent, []
        for r, grad in enumerate(self._wide(dgates).unbind(1)):
            found.append(norm.backward(grad, *(t[:, r] for t in norm.parts), self.gains[r], (True, True, False)))
        self.dgains = [by_gain.view(4, -1) for _, by_gain, _ in found]
        return [by_product.to(dgates.dtype) for by_product, _, _ in found]

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
            norm, by_gain = self.c_norm, []
            for r, grad in enumerate(self.dshown.unbind(1)):
                by_gain.append(norm.backward(grad, *(t[:, r] for t in norm.parts), self.norm_c[0][r], BY_GAIN)[1])
            found += [torch.stack(by_gain), self.dshown.sum(0)]
        return torch.stack(found, 1).to(self.call.units.dtype)

    def _wide(self, dgates: Tensor) -> Tensor:
        return dgates.to(self.dtype)


class Normalized:
    """A norm over the last dimension of a tensor, whose memory it takes, and the gradients through it."""

    def __init__(self, given: Tensor) -> None:
        # torch's formula of the gradient cancels where the mean is large.
        self.centered = given.sub_(given.mean(-1, keepdim=True))
        size = torch.linalg.vector_norm(self.centered, dim=-1, keepdim=True)
        self.rstd = size.square_().div_(given.shape[-1]).add_(EPS).rsqrt_()
        self.zero, self.shape = torch.zeros_like(self.rstd), list(given.shape[-1:])

    @property
    def value(self) -> Tensor:
        return self.centered * self.rstd

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`backward` is to be given, the rows that the gradient is of."""
        return self.centered, self.zero, self.rstd

    def backward(self, grad: Tensor, x: Tensor, zero: Tensor, rstd: Tensor, gain: Tensor, needs: Sequence[bool]) -> Any:
        """The gradients, as far as needed, by what was given and by the gain that its normalized values meet."""
        if gain.dim() > 1:  # of several recurrences
            grad, gain = grad * gain, None
        return layer_norm_backward(grad, x, self.shape, zero.contiguous(), rstd.contiguous(), gain, None, needs)


BY_GIVEN, BY_GAIN = (True, False, False), (False, True, False)
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
