"""Problems to try the error rule on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

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


MODES = ("padded", "padded", "unbatched", "packed", "packed sorted")
RAGGED = ("lengths", "resets", "lengths and resets")


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
    mode: str  # one of MODES or RAGGED
    hx: bool

    @staticmethod
    def random(seed: int, dtype: torch.dtype, largest: int, modes: Sequence[str] = MODES) -> Config:
        r = random.Random(seed)
        H = r.choice([1, 2, 3, 7, 16, r.randint(1, largest)])
        return Config(
            seed, dtype, r.randint(1, 6), r.randint(1, 5), r.randint(1, 9), H, r.randint(1, 3), r.random() < 0.5,
            r.randint(1, H - 1) if H > 1 and r.random() < 0.3 else 0, r.random() < 0.7, r.random() < 0.5,
            r.choice(modes), r.random() < 0.6,
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

    def data(self) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor] | None, dict[str, Tensor]]:
        """Input and initial states that are numbers of ``dtype``, held in fp64; and lengths and resets."""
        g = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype).double()

        groups = self.layers * (2 if self.bidirectional else 1)
        batch = () if self.mode == "unbatched" else (self.B,)
        hx = (numbers(groups, *batch, self.proj or self.H), numbers(groups, *batch, self.H)) if self.hx else None
        if self.mode == "unbatched":
            return numbers(self.T, self.I), hx, {}
        if self.mode.startswith("packed"):
            lengths = [self.T, *(random.Random(self.seed + b).randint(1, self.T) for b in range(1, self.B))]
            if self.mode == "packed sorted":
                lengths.sort(reverse=True)
            rows = [numbers(length, self.I) for length in lengths]
            return pack_sequence(rows, enforce_sorted=self.mode == "packed sorted"), hx, {}
        shape, ragged = (self.B, self.T) if self.batch_first else (self.T, self.B), {}
        if "lengths" in self.mode:
            ragged["lengths"] = torch.randint(0, self.T + 1, (self.B,), generator=g)
        if "resets" in self.mode:
            ragged["resets"] = torch.rand(shape, generator=g) < (0.1, 0.5, 1.0)[self.seed % 3]
        return numbers(*shape, self.I), hx, ragged


def results(
    module: nn.Module, config: Config, dtype: torch.dtype, device: str = "cpu", call: Callable[..., tuple] | None = None
) -> tuple[list[str], list[Tensor]]:
    """Output, states and all gradients, with cotangents on output, h_n and c_n at once, computed in ``dtype``. ``call`` is
    called in the module's place; in that of nn.LSTM, which knows neither lengths nor resets, :func:`by_episode`."""
    x, hx, ragged = config.data()
    packed = isinstance(x, PackedSequence)
    data = (x.data if packed else x).to(dtype).requires_grad_()
    given = x._replace(data=data.to(device)) if packed else data.to(device)
    if packed and x.sorted_indices is not None:
        given = given._replace(sorted_indices=x.sorted_indices.to(device), unsorted_indices=x.unsorted_indices.to(device))
    states = [] if hx is None else [t.to(dtype).requires_grad_() for t in hx]
    module.to(device)
    if call is None:
        call = partial(by_episode, module) if ragged and not isinstance(module, fused_lstm.LSTM) else module
    ragged = {name: t.to(device) for name, t in ragged.items()}
    output, (h_n, c_n) = call(given, tuple(s.to(device) for s in states) or None, **ragged)
    if packed:
        assert torch.equal(output.batch_sizes, x.batch_sizes)
        output = output.data
    if call is not module:  # a loop over no steps at all still has gradients, of zero
        output, h_n, c_n = (t + 0 * data.sum() for t in (output, h_n, c_n))
    g = torch.Generator().manual_seed(config.seed + 1)
    cotangents = [
        torch.randn(t.shape, generator=g, dtype=torch.float64).to(config.dtype).to(device, dtype) for t in (output, h_n, c_n)
    ]
    parameters = dict(module.named_parameters())
    inputs = [data, *states, *parameters.values()]
    loop = call is not module  # which may leave weights out
    grads = torch.autograd.grad((output, h_n, c_n), inputs, cotangents, materialize_grads=loop)
    names = ["output", "h_n", "c_n", "dx", *(["dh0", "dc0"] if hx else []), *("d" + n for n in parameters)]
    return names, [t.detach().cpu() for t in (output, h_n, c_n, *grads)]


def by_episode(
    lstm: nn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """nn.LSTM on each row's episodes one by one: what lengths and resets are to mean."""
    if lstm.batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.t()
    (T, B, _), D = x.shape, 1 + lstm.bidirectional
    K, H, P = lstm.num_layers * D, lstm.hidden_size, lstm.proj_size or lstm.hidden_size
    h0, c0 = (x.new_zeros(K, B, P), x.new_zeros(K, B, H)) if hx is None else hx
    reverse = (torch.arange(K) % D == 1)[:, None]
    outputs, hs, cs = [], [], []
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        begins = [] if resets is None else torch.nonzero(resets[:length, b]).flatten().tolist()
        cuts = [*sorted({0, *begins} if length else set()), length]
        h_n, c_n, parts = h0[:, b], c0[:, b], []
        for first, end in pairwise(cuts):
            # hx meets the forward direction at time 0, unless an episode begins there, and the reverse one at the end.
            takes = torch.where(reverse, torch.tensor(end == length), torch.tensor(first == 0 and 0 not in begins))
            y, (h, c) = lstm(x[first:end, b], tuple(torch.where(takes, s[:, b], 0) for s in (h0, c0)))
            parts.append(y)
            # h_n is the forward direction's at the end, the reverse one's at time 0.
            gives = torch.where(reverse, torch.tensor(first == 0), torch.tensor(end == length))
            h_n, c_n = torch.where(gives, h, h_n), torch.where(gives, c, c_n)
        outputs.append(torch.cat([*parts, x.new_zeros(T - length, D * P)]))
        hs.append(h_n)
        cs.append(c_n)
    return torch.stack(outputs, 0 if lstm.batch_first else 1), (torch.stack(hs, 1), torch.stack(cs, 1))


@lru_cache(maxsize=1)
def yardsticks(config: Config) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names of results, and nn.LSTM's in the call's dtype and in fp64, of numbers rounded to that dtype."""
    rounded = config.module().to(config.dtype)
    names, exact = results(rounded.double(), config, torch.float64)
    torchs = exact if config.dtype == torch.float64 else results(rounded.to(config.dtype), config, config.dtype)[1]
    return names, torchs, exact


def add_config(rules: Mapping[Way, Rule], config: Config) -> None:
    """fused_lstm.LSTM in some ways against nn.LSTM of the same dtype, all measured against nn.LSTM in fp64."""
    names, *theirs = yardsticks(config)
    for (backend, recompute), rule in rules.items():
        if backend == "triton":
            skip_unless_it_compiles(config.dtype)
        ours = fused_lstm.LSTM.from_torch(config.module().to(config.dtype), backend=backend, recompute=recompute)
        _, found = results(ours, config, config.dtype, DEVICE if backend == "triton" else "cpu")
        rule.add((backend, recompute, config), names, found, *theirs)
