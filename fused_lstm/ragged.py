"""Lengths and resets for an LSTM that knows only plain sequences: torch's fused one.

Two columns are appended to the input and to W_ih, with weights so large that a 1 in them decides every gate: one makes a
step hold the cell and show nothing (padding), the other makes it clear the state (a reset, on a step put in between). The
fused kernel then serves ragged batches at the speed of padded ones, and its own backward pass is exact: shut gates have a
derivative of zero. What no gate can stop is a NaN: zero times NaN is NaN, so one in the state outlives a reset here.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_COST = 8  # of a step beside its rows, as a number of rows


class Unfolding:
    """How one direction of ragged sequences is laid out for an LSTM that knows only plain ones.

    Each row is laid out in the order of processing, with one more step in front of each reset, on which the state is
    cleared; what remains at the end is padding, on which the cell holds. ``position`` (T, B) is where the step of time t
    goes; the layout has ``steps`` steps. With lengths alone, forwards, it is the identity.
    """

    def __init__(self, T: int, B: int, lengths: Tensor | None, resets: Tensor | None, backwards: bool) -> None:
        device = (resets if lengths is None else lengths).device
        t = torch.arange(T, device=device)[:, None]
        ends = torch.full((B,), T, device=device) if lengths is None else lengths
        self.valid = t < ends
        # Rows whose hx is not to be seen, since an episode begins at their first step; (B, 1), None if there are none.
        self.begins = None if resets is None or backwards else (resets[0] & self.valid[0])[:, None]
        self.rows = torch.arange(B, device=device).expand(T, B)
        self.steps, self.identity = T, resets is None and not backwards
        self.position = torch.where(self.valid, ends - 1 - t, t) if backwards else t  # in the order of processing
        self.flags: Tensor | None = None
        if resets is not None:
            # Between t-1 and t: before step t forwards; backwards before t-1, and so not for t = 0.
            resets = resets & self.valid
            self.steps = T + int(resets.sum(0).max()) if B else T  # as many in either direction
            if backwards:
                resets = torch.cat((resets[1:], torch.zeros_like(resets[:1])))
            total = resets.sum(0)
            before = resets.flip(0).cumsum(0).flip(0) if backwards else resets.cumsum(0)
            self.position = self.position + torch.where(self.valid, before, total)
            self.flags = torch.zeros(self.steps, B, dtype=torch.bool, device=device)
            self.flags[(self.position - 1)[resets], self.rows[resets]] = True
        self.padding = ~self.valid
        self.blank = self.past = Rest(self.padding)
        self.ends = ends
        if self.flags is not None:
            self.ends = ends + total
            self.padding = torch.arange(self.steps, device=device)[:, None] >= self.ends
            self.blank = Rest(self.padding | self.flags)
        last = torch.zeros_like(ends) if backwards else (ends - 1).clamp(min=0)
        # Position of each row's last step.
        self.last = last if self.identity or not T else self.position[last, self.rows[0]]
        self.empty = (ends == 0)[:, None]

    def lay_out(self, x: Tensor) -> Tensor:
        """x (T, B, I) with its control columns; what it holds past a row's length does not matter."""
        B, I = x.shape[1:]  # noqa: E741
        laid_out = x.new_empty(self.steps, B, I + (1 if self.flags is None else 2))
        if self.identity:
            laid_out[..., :I] = x
        else:
            laid_out[..., :I].index_put_((self.position, self.rows), x)
        self.blank.clear_(laid_out)
        laid_out[..., I] = self.padding
        if self.flags is not None:
            laid_out[..., I + 1] = self.flags
        return laid_out

    def take_back(self, y: Tensor, c_n: Tensor) -> Tensor:
        """The steps of time 0..T-1 out of the laid-out y, whose last cell state is c_n; zero past a row's length."""
        if not self.identity:
            y = y[self.position, self.rows]
        elif y.requires_grad:  # a backward pass needs it as it is
            y = y.clone()
        elif y.device.type == "cpu" and not c_n.isnan().any():
            return y  # zero there, since the output gate is shut; unless a NaN got in, which the cell then holds to the end
        return self.past.clear_(y)

    def split(self) -> int:
        """The step after which only the longer rows are worth running, 0 for none. Known only on a CPU."""
        B = self.ends.shape[0]
        if self.ends.device.type != "cpu" or int(self.ends.sum()) >= 0.6 * self.steps * B:
            return 0
        ends = self.ends.sort().values
        longer = torch.arange(B - 1, -1, -1)
        # A step costs about as much as its rows and some more.
        cost = ends * (B + STEP_COST) + (self.steps - ends) * (longer + STEP_COST)
        best = int(cost.argmin())
        return int(ends[best]) if int(cost[best]) < 0.7 * self.steps * (B + STEP_COST) else 0

    def spread(self, y: Tensor) -> Tensor:
        """What :meth:`take_back` made, or a gradient by it, laid out again: (steps, B, H)."""
        y = torch.where(self.valid[..., None], y, 0)
        return y.new_zeros(self.steps, *y.shape[1:]).index_put_((self.position, self.rows), y)

    def gather(self, dx: Tensor) -> Tensor:
        """The gradient by what :meth:`lay_out` took, with those by the control columns, from that by what it made."""
        return torch.where(self.valid[..., None], dx[self.position, self.rows], 0)


class Rest:
    """The steps of a layout that ``mask`` (steps, B) says hold nothing."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask[..., None]
        # On a CPU their index is soon found, and filling few rows is several times quicker than a choice for each number.
        self.index = mask.flatten().nonzero()[:, 0] if mask.device.type == "cpu" else None

    def clear_(self, data: Tensor) -> Tensor:
        """Put zero there, in data (steps, B, features) that is contiguous."""
        if self.index is None:
            return data.masked_fill_(self.mask, 0)
        data.view(-1, data.shape[-1]).index_fill_(0, self.index, 0)
        return data


def control_weights(w_ih: Tensor, resets: bool) -> Tensor:
    """w_ih (4H, I) with the weights of the control columns: gates so far open or shut that nothing else matters.

    On padding the forget gate is open, input and output gate are shut: the cell holds, the output is zero. On a clearing
    step all three are shut: cell and output are zero, and with them all that the next step sees.
    """
    H = w_ih.shape[0] // 4
    shut = w_ih.new_full((H,), -min(1e20, torch.finfo(w_ih.dtype).max / 2))
    zero = torch.zeros_like(shut)
    columns = [torch.cat((shut, -shut, zero, shut))]
    if resets:
        columns.append(torch.cat((shut, shut, zero, shut)))
    return torch.cat((w_ih, torch.stack(columns, 1)), 1)
