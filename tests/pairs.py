"""torch.nn.LSTM and fused_lstm.LSTM side by side: what the tests of the public layer share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_lstm

IN_INTERPRETER = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CPU tensors: interpreter only")
BACKENDS = ("auto", "aten", "reference", pytest.param("triton", marks=[pytest.mark.kernels, IN_INTERPRETER]))
NUMPYS = "ignore:Conversion of an array with ndim:DeprecationWarning"  # about the interpreter of Triton 3.6
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_quick_backend = pytest.mark.parametrize("backend", BACKENDS[:3])  # for many calls: the interpreter is slow


def pair(*args: Any, backend: str = "auto", recompute: bool = False, **kwargs: Any) -> tuple[nn.LSTM, fused_lstm.LSTM]:
    """torch's layer and ours, with the same weights."""
    theirs, ours = nn.LSTM(*args, **kwargs), fused_lstm.LSTM(*args, backend=backend, recompute=recompute, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers that depend on nothing but the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def states(*shape: int, proj: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """h0 and c0 for c0's shape."""
    return randn(*shape[:-1], proj or shape[-1], dtype=dtype), randn(*shape, dtype=dtype) / 2


def flat(result: tuple) -> list[Tensor]:
    """output, h_n and c_n of a call."""
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


def packed(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> list[Tensor]:
    """What torch's layer needs for padded data (T, B, I): pack, run, unpack."""
    y, (h_n, c_n) = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return [pad_packed_sequence(y, total_length=x.shape[0])[0], h_n, c_n]


def assert_all_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def all_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def failure(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """Type and message of the error that a call raises."""
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as info:
        call()
    return info.type, str(info.value)


def change_and_run(layer: nn.Module, x: Tensor, queue: Any) -> None:
    """For a spawned process, which can import this file by its name, as it cannot a test's."""
    flat(layer(x))[0].sum().backward()
    with torch.no_grad():
        layer.weight_hh_l0 += 1
    queue.put([t.detach().tolist() for t in flat(layer(x))])


def call(lstm: fused_lstm.LSTM, extras: str, T: int, B: int) -> dict[str, Any]:
    """Arguments for a call, by name: the input, and those of hx, lengths and resets that ``extras`` names."""
    dtype = lstm.weight_ih_l0.dtype
    shape = (B, T) if lstm.batch_first else (T, B)
    arguments = {
        "input": randn(*shape, lstm.input_size, dtype=dtype),
        "hx": states((1 + lstm.bidirectional) * lstm.num_layers, B, lstm.hidden_size, proj=lstm.proj_size, dtype=dtype),
        "lengths": torch.tensor([T, 0, 1, T // 2])[torch.arange(B) % 4],
        "resets": randn(*shape) > 0.5,
    }
    return {name: value for name, value in arguments.items() if name in ("input", *extras.split())}


def dynamic_sizes(lstm: fused_lstm.LSTM, extras: str, T: Any, B: Any) -> dict[str, Any]:
    """Which sizes of the arguments of :func:`call` are T and B, as torch.export takes it."""
    sizes = {0: B, 1: T} if lstm.batch_first else {0: T, 1: B}
    arguments = {"input": sizes, "hx": ({1: B}, {1: B}), "lengths": {0: B}, "resets": sizes}
    return {name: value for name, value in arguments.items() if name in ("input", *extras.split())}


class Graphs:
    """A compiler that runs its graphs as they are, and notes how many layers each holds."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.layers: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        self.layers.append(layers_in(module.graph))
        return module.forward


def layers_in(graph: torch.fx.Graph) -> int:
    return sum("layer_forward" in str(node.target) for node in graph.nodes)
