"""fp32 on CUDA follows torch's own switch for cuDNN, as torch.nn.LSTM does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def tf32_allowed() -> bool:
    """Whether torch lets cuDNN's fp32 recurrent layers use TF32 (``torch.backends.cudnn``)."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    precision = getattr(rnn, "fp32_precision", None)  # torch >= 2.9; "none" defers to the switch for all of cuDNN
    if precision in ("tf32", "ieee"):
        return precision == "tf32"
    return torch.backends.cudnn.allow_tf32


@contextmanager
def tf32_as_cudnn(x: Tensor) -> Iterator[None]:
    """Let the GEMMs inside use TF32 exactly when cuDNN's LSTM would; does nothing off CUDA or in another dtype."""
    if not x.is_cuda or x.dtype != torch.float32:
        yield
        return
    before = torch._C._get_cublas_allow_tf32()
    torch._C._set_cublas_allow_tf32(tf32_allowed())
    try:
        yield
    finally:
        torch._C._set_cublas_allow_tf32(before)
