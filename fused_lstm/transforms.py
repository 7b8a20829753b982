"""Which of torch's function transforms a call runs under."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether a level of forward-mode AD is open: torch.func.jvp, jacfwd or hessian, or torch.autograd.forward_ad."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def active() -> bool:
    """Whether a transform of torch.func (vmap, grad, vjp, jvp, ...) is at work around the call."""
    return torch._C._are_functorch_transforms_active()


def differentiates() -> bool:
    """Whether one of them takes a derivative."""
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)


for _function in (active, differentiates):  # a compiler is to call these, while it traces, not to look inside
    _function._dynamo_marked_constant = True


def mapped(tensors: Iterable[Tensor]) -> bool:
    """Whether vmap maps over one of the tensors."""
    functorch = torch._C._functorch
    for t in tensors:
        while functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_batchedtensor(t):
                return True
            t = functorch.get_unwrapped(t)
    return False
