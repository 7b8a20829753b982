"""The error rule, and problems to try it on."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm

# Kernels are tested on a GPU where there is one, else in the interpreter.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available() else "cuda"


def skip_unless_it_compiles(dtype: torch.dtype) -> None:
    from fused_lstm import launch

    if dtype == torch.float64 and not launch.FP64:
        pytest.skip("this Triton cannot compile fp64 products")


SMALL = 256  # elements below which a tensor's error is too few samples to be judged alone


class Rule:
    """The error rule: our error against fp64 is at most twice torch's in the same precision, plus a tiny term.

    RMS and maximum, of errors relative to the tensor's largest value, or to 0.01 if that is larger: inside the cell
    numbers are of order one, and so is what their rounding costs. The RMS is judged tensor by tensor; where it would be
    that of a few numbers, and for the maximum, which one unlucky rounding decides, over all tensors and problems added.
    The tiny term is one unit in the last place for the maximum, half a unit for the RMS; in fp64, where torch's own result
    is the reference, 32 such units.
    """

    def __init__(self) -> None:
        self.all: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self.small: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def add(
        self,
        what: object,
        names: Sequence[str],
        ours: Sequence[Tensor],
        torchs: Sequence[Tensor],
        exact: Sequence[Tensor],
    ) -> None:
        for name, a, b, e in zip(names, ours, torchs, exact, strict=True):
            assert a.shape == e.shape, f"{what}: {name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
            assert a.dtype == b.dtype, f"{what}: {name}: dtype {a.dtype}, expected {b.dtype}"
            largest = e.abs().amax().item() if e.numel() else 0.0
            if largest == 0:
                assert not a.any(), f"{what}: {name}: should be zero"
                continue
            scale = max(largest, 0.01)
            pair = tuple(torch.nan_to_num((t.double() - e).abs() / scale, torch.inf).flatten() for t in (a, b))
            assert pair[0].max() < 0.1, f"{what}: {name}: relative error {pair[0].max():.1e}"
            self.all.setdefault(a.dtype, []).append(pair)
            if e.numel() >= SMALL:
                self._judge(f"{what}: {name}", a.dtype, "RMS", *pair)
            else:
                self.small.setdefault(a.dtype, []).append(pair)

    def check(self) -> None:
        for kind, pools in (("maximum", self.all), ("RMS", self.small)):
            for dtype, pool in pools.items():
                self._judge(str(dtype), dtype, kind, *(torch.cat(e) for e in zip(*pool, strict=True)))

    @staticmethod
    def _judge(what: str, dtype: torch.dtype, kind: str, mine: Tensor, theirs: Tensor) -> None:
        unit = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
        of, tiny = (torch.amax, unit) if kind == "maximum" else (lambda t: t.square().mean().sqrt(), unit / 2)
        got, yardstick = of(mine).item(), of(theirs).item()
        assert got <= 2 * yardstick + tiny, f"{what}: relative {kind} error {got:.2e}, torch's {yardstick:.2e}"


@dataclass(frozen=True)
class Config:
    """One random call of an LSTM."""

    seed: int
    dtype: torch.dtype
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int
    bidirectional: bool
    proj: int
    bias: bool
    batch_first: bool
    mode: str  # padded, unbatched, packed, packed sorted
    hx: bool

    @staticmethod
    def random(seed: int, dtype: torch.dtype, largest: int) -> Config:
        r = random.Random(seed)
        H = r.choice([1, 2, 3, 7, 16, r.randint(1, largest)])
        return Config(
            seed, dtype, r.randint(1, 6), r.randint(1, 5), r.randint(1, 9), H, r.randint(1, 3), r.random() < 0.5,
            r.randint(1, H - 1) if H > 1 and r.random() < 0.3 else 0, r.random() < 0.7, r.random() < 0.5,
            r.choice(["padded", "padded", "unbatched", "packed", "packed sorted"]), r.random() < 0.6,
        )  # fmt: skip

    def module(self) -> nn.LSTM:
        torch.manual_seed(self.seed)
        return nn.LSTM(
            self.I,
            self.H,
            self.layers,
            self.bias,
            self.batch_first,
            0.0,
            self.bidirectional,
            self.proj,
            dtype=torch.float64,
        )

    def data(self) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor] | None]:
        """Input and initial states that are numbers of ``dtype``, held in fp64."""
        g = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype).double()

        groups = self.layers * (2 if self.bidirectional else 1)
        batch = () if self.mode == "unbatched" else (self.B,)
        hx = (numbers(groups, *batch, self.proj or self.H), numbers(groups, *batch, self.H)) if self.hx else None
        if self.mode == "unbatched":
            return numbers(self.T, self.I), hx
        if self.mode.startswith("packed"):
            lengths = [self.T, *(random.Random(self.seed + b).randint(1, self.T) for b in range(1, self.B))]
            if self.mode == "packed sorted":
                lengths.sort(reverse=True)
            rows = [numbers(length, self.I) for length in lengths]
            return pack_sequence(rows, enforce_sorted=self.mode == "packed sorted"), hx
        return numbers(self.B, self.T, self.I) if self.batch_first else numbers(self.T, self.B, self.I), hx


def results(module: nn.Module, config: Config, dtype: torch.dtype, device: str = "cpu") -> tuple[list[str], list[Tensor]]:
    """Output, states and all gradients, with cotangents on output, h_n and c_n at once, computed in ``dtype``."""
    x, hx = config.data()
    packed = isinstance(x, PackedSequence)
    data = (x.data if packed else x).to(dtype).requires_grad_()
    given = x._replace(data=data.to(device)) if packed else data.to(device)
    if packed and x.sorted_indices is not None:
        given = given._replace(sorted_indices=x.sorted_indices.to(device), unsorted_indices=x.unsorted_indices.to(device))
    states = [] if hx is None else [t.to(dtype).requires_grad_() for t in hx]
    output, (h_n, c_n) = module.to(device)(given, tuple(s.to(device) for s in states) or None)
    if packed:
        assert torch.equal(output.batch_sizes, x.batch_sizes)
        output = output.data
    g = torch.Generator().manual_seed(config.seed + 1)
    cotangents = [
        torch.randn(t.shape, generator=g, dtype=torch.float64).to(config.dtype).to(device, dtype) for t in (output, h_n, c_n)
    ]
    parameters = dict(module.named_parameters())
    inputs = [data, *states, *parameters.values()]
    grads = torch.autograd.grad((output, h_n, c_n), inputs, cotangents)
    names = ["output", "h_n", "c_n", "dx", *(["dh0", "dc0"] if hx else []), *("d" + n for n in parameters)]
    return names, [t.detach().cpu() for t in (output, h_n, c_n, *grads)]


def add_config(rule: Rule, config: Config, backend: str, recompute: bool = False) -> None:
    """fused_lstm.LSTM against nn.LSTM of the same dtype, both measured against nn.LSTM in fp64."""
    if backend == "triton":
        skip_unless_it_compiles(config.dtype)
    rounded = config.module().to(config.dtype)
    names, exact = results(rounded.double(), config, torch.float64)
    rounded = rounded.to(config.dtype)
    _, torchs = results(rounded, config, config.dtype)
    ours = fused_lstm.LSTM.from_torch(rounded, backend=backend, recompute=recompute)
    _, ours = results(ours, config, config.dtype, DEVICE if backend == "triton" else "cpu")
    rule.add(config, names, ours, torchs, exact)
