"""Matrix products of the explicit path, by the fastest library that torch carries for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU torch gives fp32 products to its BLAS, and oneDNN's are up to 2.2 times faster (MKL on an AMD EPYC) from about
# this many multiply-adds on; below, its overhead costs more. The op is the one torch's own compiler emits; it has no
# derivative, so it is for code that needs none.
ONEDNN_FROM = 2**21


def _onednn_linear():
    """torch's oneDNN linear op; None where torch was built without it."""
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return op.default if op is not None and torch.backends.mkldnn.is_available() else None


_ONEDNN_LINEAR = _onednn_linear()


def uses_onednn(x: Tensor, w: Tensor) -> bool:
    """Whether :func:`linear` gives x (M, K), w (N, K) to oneDNN."""
    return (
        _ONEDNN_LINEAR is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] * w.numel() >= ONEDNN_FROM
    )


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias for x (M, K), w (N, K), bias (N,); not differentiable."""
    if uses_onednn(x, w):
        return _ONEDNN_LINEAR(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)
