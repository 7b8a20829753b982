"""What composes with torch, device by device: the same code on a CPU and, where there is one, on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fused_lstm

every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make(device: str) -> tuple[fused_lstm.LSTM, nn.LSTM, torch.Tensor]:
    """The layer, nn.LSTM in fp64 on the CPU with the same weights, and an input for both."""
    torch.manual_seed(0)
    exact = nn.LSTM(5, 24, 2, bidirectional=True, dtype=torch.float64)
    ours = fused_lstm.LSTM(5, 24, 2, bidirectional=True, device=device)
    ours.load_state_dict(exact.state_dict())
    return ours, exact, torch.randn(7, 3, 5)


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    ours, exact, x = make(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    with torch.autocast(device, dtype):
        results = tree_leaves(ours(x.to(device)))
        assert {t.dtype for t in results} == {dtype}
        loss = sum(t.float().square().mean() for t in results)
    scaler.scale(loss).backward()
    expected = tree_leaves(exact(x.double()))
    sum(t.square().mean() for t in expected).backward()
    tolerance = 1e-2 if dtype == torch.float16 else 4e-2
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=tolerance * b.abs().max().item())
    for a, b in zip(ours.parameters(), exact.parameters(), strict=True):
        assert a.grad is not None
        assert a.grad.dtype == torch.float32
        assert (a.grad.double().cpu() / 2**8 - b.grad).norm() < 4 * tolerance * b.grad.norm()


@every_device
def test_transforms(device: str) -> None:
    """An ensemble and its gradients, per-sample gradients, a tangent, a gradient of a gradient: against loops on the CPU."""
    ours, exact, x = make(device)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    doubles = {name: p.detach() for name, p in exact.named_parameters()}

    def loss(module: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    def close(a: object, b: object) -> None:
        for p, q in zip(tree_leaves(a), tree_leaves(b), strict=True):
            torch.testing.assert_close(p.double().cpu(), q, rtol=5e-3, atol=5e-3 * max(1.0, q.abs().max().item()))

    def by(module: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
        return grad(lambda w: loss(module, w, x))(weights)

    scales = (0.5, 1.0, 1.5)
    members = {name: torch.stack([s * w for s in scales]) for name, w in weights.items()}
    expected = [by(exact, {name: s * w for name, w in doubles.items()}, x.double()) for s in scales]
    close(vmap(lambda w: by(ours, w, x.to(device)))(members), {k: torch.stack([e[k] for e in expected]) for k in weights})

    per_sample = vmap(lambda x: by(ours, weights, x[:, None]), in_dims=1)(x.to(device))
    expected = [by(exact, doubles, x[:, b : b + 1].double()) for b in range(3)]
    close(per_sample, {k: torch.stack([e[k] for e in expected]) for k in weights})

    tangent = torch.randn_like(x)
    close(jvp(lambda x: ours(x)[0], (x.to(device),), (tangent.to(device),))[1],
          jvp(lambda x: exact(x)[0], (x.double(),), (tangent.double(),))[1])  # fmt: skip

    seconds = []
    for module, given in ((ours, x.to(device)), (exact, x.double())):
        (g,) = torch.autograd.grad(module(given.requires_grad_())[0].square().sum(), given, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), list(module.parameters())))
    close(*seconds)
    assert set(stack_module_state([ours])[0]) == set(weights)


@every_device
def test_compiled(device: str) -> None:
    ours, exact, x = make(device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (x, x[:5, :2]):
        lengths = torch.tensor([given.shape[0], 2, 3][: given.shape[1]])
        y = compiled(given.to(device), lengths=lengths.to(device))[0]
        packed = nn.utils.rnn.pack_padded_sequence(given.double(), lengths, enforce_sorted=False)
        expected, _ = nn.utils.rnn.pad_packed_sequence(exact(packed)[0], total_length=given.shape[0])
        ours.zero_grad()
        exact.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        for a, b in ((y, expected), (ours.weight_hh_l0.grad, exact.weight_hh_l0.grad)):
            torch.testing.assert_close(a.double().cpu(), b, rtol=5e-3, atol=5e-3 * b.abs().max().item())


class Transfer(TorchFunctionMode):
    """Stands in for a GPU: a tensor of the meta device holds ``numbers``, which a copy shows that is waited for."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.to and args[0].is_meta:
            return torch.zeros_like(self.numbers) if kwargs["non_blocking"] else self.numbers
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lengths_and_resets_of_a_gpu_for_data_on_the_cpu(backend: str) -> None:
    lstm, x = fused_lstm.LSTM(5, 8, backend=backend), torch.randn(7, 3, 5)
    for kind, numbers in (("lengths", torch.tensor([7, 2, 3])), ("resets", torch.rand(7, 3) < 0.3)):
        with Transfer(numbers):
            y = lstm(x, **{kind: numbers.to("meta")})[0]
        assert torch.equal(y, lstm(x, **{kind: numbers})[0])
    with (
        Transfer(torch.tensor([8, 2, 3])),
        pytest.raises(ValueError, match="lengths should be between 0 and T = 7, got 2 to 8"),
    ):
        lstm(x, lengths=torch.empty(3, device="meta", dtype=torch.int64))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torchs_default_device_does_not_matter(backend: str, recompute: bool) -> None:
    lstm, x = fused_lstm.LSTM(5, 8, bidirectional=True, backend=backend, recompute=recompute), torch.randn(40, 4, 5)
    packed = nn.utils.rnn.pack_sequence([x[:n, 0] for n in (9, 3, 3)])
    calls = [lambda: lstm(packed)[0].data, *(partial(lambda n: lstm(x, lengths=n)[0], n) for n in ((40, 1, 1, 0), [3] * 4))]
    for call in calls:
        results = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                y = call()
                results.append((y, *torch.autograd.grad(y.sum(), list(lstm.parameters()))))
        assert all(map(torch.equal, *results))
