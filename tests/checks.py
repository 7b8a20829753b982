"""Problems to try the error rule on."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from measure import Rule
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm

# Kernels are tested on a GPU where there is one, else in the interpreter.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available() else "cuda"

Way = tuple[str, bool]  # a backend, and whether with recompute
CPU_WAYS: tuple[Way, ...] = (("aten", False), ("aten", True), ("reference", False), ("reference", True))
KERNELS_WAYS: tuple[Way, ...] = (("triton", False), ("triton", True))


def skip_unless_it_compiles(dtype: torch.dtype) -> None:
    from fused_lstm import launch

    if dtype == torch.float64 and not launch.FP64:
        pytest.skip("this Triton cannot compile fp64 products")


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


def add_config(rules: Mapping[Way, Rule], config: Config) -> None:
    """fused_lstm.LSTM in some ways against nn.LSTM of the same dtype, all measured against nn.LSTM in fp64."""
    rounded = config.module().to(config.dtype)
    names, exact = results(rounded.double(), config, torch.float64)
    rounded = rounded.to(config.dtype)
    torchs = exact if config.dtype == torch.float64 else results(rounded, config, config.dtype)[1]
    for (backend, recompute), rule in rules.items():
        if backend == "triton":
            skip_unless_it_compiles(config.dtype)
        ours = fused_lstm.LSTM.from_torch(rounded, backend=backend, recompute=recompute)
        _, found = results(ours, config, config.dtype, DEVICE if backend == "triton" else "cpu")
        rule.add((backend, recompute, config), names, found, torchs, exact)
