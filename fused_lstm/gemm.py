"""Matrix products: by the fastest library that torch carries; on CUDA in TF32 exactly where cuDNN's LSTM uses it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from threading import Lock

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
    large = x.is_cpu and x.numel() * w.shape[0] >= ONEDNN_FROM
    return large and x.dtype == torch.float32 and _ONEDNN_LINEAR is not None


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w^T + bias for x (..., K), w (N, K), bias (N,); not differentiable."""
    if uses_onednn(x, w):
        return _ONEDNN_LINEAR(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a (M, K), b (K, N)."""
    return linear(a, b.t()) if a.is_cpu else a @ b


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T @ b for a (N, M), b (N, K): the sum over rows of outer products.

    On a CPU in the order that oneDNN is quickest at. Rows with gaps between them, as one direction of two has them, are
    copied first: with these it is a thousand times slower.
    """
    return linear(b.contiguous().t(), a.contiguous().t()).t().contiguous() if a.is_cpu else a.t() @ b


# torch 2.8 and newer add up products of halves on CUDA in fp32 and leave it so; older ones round, as they do other halves.
_WIDE_BMM = getattr(torch.ops.aten.bmm, "dtype_out", None)


def batched(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The products a @ b (R, M, N) of a (R, M, K) and b (R, K, N), written to out, which may be wider than they are."""
    if out.dtype == a.dtype:
        return torch.bmm(a, b, out=out)
    if a.is_cuda and _WIDE_BMM is not None:
        return _WIDE_BMM(a, b, out.dtype, out=out)
    return out.copy_(torch.bmm(a, b) if a.is_cuda else torch.bmm(a.to(out.dtype), b.to(out.dtype)))


# From torch 2.9 on each kind of op has a switch, which may inherit a general one; the older switch for products remains, and
# raises when it is read unless both say the same.
_precision = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN's fp32 recurrent layers use TF32 (``torch.backends.cudnn``)."""
    return torch.backends.cudnn.allow_tf32 if _precision is None else _precision("cuda", "rnn") == "tf32"


def tf32_as_cudnn(x: Tensor) -> AbstractContextManager[None]:
    """Let the GEMMs inside use TF32 exactly when cuDNN's LSTM would; does nothing off CUDA or in another dtype."""
    return _AS_CUDNN if x.is_cuda and x.dtype == torch.float32 else NOTHING


class _AsCudnn:
    """Sets torch's switches for products, where they differ from the one for cuDNN's recurrent layers.

    torch has no others than those of the whole process: while a call is in here, the fp32 products of all threads go by
    them, and a change that another thread makes is lost. The last call to leave puts back what the first one found.
    """

    def __init__(self) -> None:
        self.lock, self.calls, self.undo = Lock(), 0, None

    def __enter__(self) -> None:
        tf32 = tf32_allowed()
        with self.lock:
            if tf32 != (torch._C._get_cublas_allow_tf32() if _precision is None else _precision("cuda", "matmul") == "tf32"):
                undo = _switch(tf32)
                self.undo = self.undo or undo
            self.calls += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.calls -= 1
            if self.calls == 0 and self.undo is not None:
                self.undo()
                self.undo = None


_AS_CUDNN = _AsCudnn()


def _switch(tf32: bool) -> Callable[[], None]:
    """Set both switches for products, the older one as far as it can be put back; returns what puts them back."""
    try:
        older = torch._C._get_float32_matmul_precision()
    except RuntimeError:  # the two already differ
        older = None
    if _precision is None:
        torch._C._set_cublas_allow_tf32(tf32)
        return partial(torch._C._set_float32_matmul_precision, older)
    own = _own("cuda", "matmul")
    if older in ("highest", "high"):
        torch._C._set_cublas_allow_tf32(tf32)
    _set_precision("cuda", "matmul", "tf32" if tf32 else "ieee")

    def undo() -> None:
        if older in ("highest", "high"):
            torch._C._set_cublas_allow_tf32(older == "high")
        _set_precision("cuda", "matmul", own)

    return undo


_PARENT = {("cuda", "matmul"): ("cuda", "all"), ("cuda", "all"): ("generic", "all")}


def _own(*switch: str) -> str:
    """What a switch says itself, "none" if it inherits. torch tells only what that comes to: see whether it follows."""
    found, parent = _precision(*switch), _PARENT.get(switch)
    if found == "none" or parent is None or found != _precision(*parent):
        return found
    before = _own(*parent)
    _set_precision(*parent, "ieee" if found == "tf32" else "tf32")
    follows = _precision(*switch) != found
    _set_precision(*parent, before)
    return "none" if follows else found
