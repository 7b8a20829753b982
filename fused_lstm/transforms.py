"""Which of torch's function transforms a call runs under."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether a level of forward-mode AD is open: torch.func.jvp, jacfwd or hessian, or torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def active() -> bool:
    """Whether a transform of torch.func (vmap, grad, vjp, jvp, ...) is at work around the call."""
    return torch._C._are_functorch_transforms_active()
