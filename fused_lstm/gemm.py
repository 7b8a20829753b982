"""Matrix products: by the fastest library that torch carries; on CUDA in TF32 exactly where cuDNN's LSTM uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import NOTHING

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
    """Whether :func:`linear` gives x (..., K), w (N, K) to oneDNN."""
    return (
        not x.is_cuda
        and x.dtype == torch.float32
        and x.numel() * w.shape[0] >= ONEDNN_FROM
        and _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
    )


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias for x (..., K), w (N, K), bias (N,); not differentiable."""
    if uses_onednn(x, w):
        return _ONEDNN_LINEAR(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T @ b for a (N, M), b (N, K): the sum over rows of outer products.

    On a CPU in the order that oneDNN is quickest at. Rows with gaps between them, as one direction of two has them, are
    copied first: with these it is a thousand times slower.
    """
    return linear(b.contiguous().t(), a.contiguous().t()).t().contiguous() if a.device.type == "cpu" else a.t() @ b


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN's fp32 recurrent layers use TF32 (``torch.backends.cudnn``)."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(rnn, "fp32_precision", None)  # torch >= 2.9; "none" defers to the switch for all of cuDNN
    if precision in ("tf32", "ieee"):
        return precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def tf32_as_cudnn(x: Tensor) -> AbstractContextManager[None]:
    """Let the GEMMs inside use TF32 exactly when cuDNN's LSTM would; does nothing off CUDA or in another dtype."""
    return _as_cudnn() if x.is_cuda and x.dtype == torch.float32 else NOTHING


@contextmanager
def _as_cudnn() -> Iterator[None]:
    before = torch._C._get_cublas_allow_tf32()
    torch._C._set_cublas_allow_tf32(tf32_allowed())
    try:
        yield
    finally:
        torch._C._set_cublas_allow_tf32(before)
