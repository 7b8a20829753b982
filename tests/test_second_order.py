"""Derivatives of derivatives: by finite differences in fp64, and as people use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import every_backend
from torch import Tensor, nn

import fused_lstm
from fused_lstm.call import Stack
from fused_lstm.cpu import aten

LAYERS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"proj_size": 1, "bias": False, "bidirectional": True},
    {"recompute": True},
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=["plain", "bidirectional", "projection", "recompute"])
without_kernels = pytest.mark.parametrize("backend", ["aten", "reference"])


@every_layer
@pytest.mark.parametrize("ragged", ["", "lengths", "resets", "both"])
@without_kernels
def test_gradgradcheck(backend: str, layer: dict[str, Any], ragged: str) -> None:
    """By input, states and every parameter at once, through output, h_n and c_n."""
    torch.manual_seed(0)
    m = fused_lstm.LSTM(2, 2, **layer, backend=backend, dtype=torch.float64)
    T, B, D = 3, 3, 2 if m.bidirectional else 1
    shape = (B, T) if m.batch_first else (T, B)
    given: dict[str, Any] = {}
    if ragged in ("lengths", "both"):
        given["lengths"] = [3, 0, 2]
    if ragged in ("resets", "both"):
        given["resets"] = torch.rand(shape) < 0.4
    states = [torch.randn(D * m.num_layers, B, size).double() for size in (m.proj_size or 2, 2)]
    inputs = [torch.randn(*shape, 2).double(), *states, *(p.detach().clone() for p in m.parameters())]
    names = [name for name, _ in m.named_parameters()]

    def run(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, weights, strict=True))
        y, states = torch.func.functional_call(m, named, (x, (h, c)), given)
        return y, *states

    assert torch.autograd.gradgradcheck(run, [t.requires_grad_() for t in inputs], fast_mode=True)


@every_layer
def test_what_runs_on_cudnn_can_be_differentiated_twice(layer: dict[str, Any]) -> None:
    """torch's own LSTM as it is called on CUDA; its gradients are its own, those of the gradients a loop's."""
    torch.manual_seed(0)
    m = nn.LSTM(2, 3, **{k: v for k, v in layer.items() if k != "recompute"}, dtype=torch.float64)
    D, B = 2 if m.bidirectional else 1, 2
    states = [torch.randn(D * m.num_layers, B, size).double() for size in (m.proj_size or 3, 3)]
    x = torch.randn((B, 4, 2) if m.batch_first else (4, B, 2)).double()
    inputs = [t.detach().requires_grad_() for t in (x, *states, *m.parameters())]
    stack = Stack(m.bias, m.num_layers, 0.0, m.bidirectional, m.batch_first)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return aten.TwiceDifferentiable.apply(stack, *given)

    cotangents = [torch.randn_like(t) for t in run(*inputs)]
    ours = torch.autograd.grad(run(*inputs), inputs, cotangents)
    weights = dict(zip(dict(m.named_parameters()), inputs[3:], strict=True))
    y, (h, c) = torch.func.functional_call(m, weights, (inputs[0], tuple(inputs[1:3])))
    torch.testing.assert_close(ours, torch.autograd.grad((y, h, c), inputs, cotangents))
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    results = run(*inputs)
    for _ in range(2):  # kept as long as the graph
        torch.autograd.grad(results[2].sum(), inputs[2], retain_graph=True)
    inputs[1].detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(results[0].sum(), inputs[0])


@every_backend
def test_third_derivative(backend: str) -> None:
    torch.manual_seed(0)
    m = fused_lstm.LSTM(2, 3, backend=backend)
    x = torch.randn(3, 2, 2, requires_grad=True)

    def derivatives(m: nn.Module) -> list[Tensor]:
        found = [m(x)[0].pow(3).sum()]
        for _ in range(3):
            (g,) = torch.autograd.grad(found[-1], x, create_graph=True)
            found.append(g.pow(2).sum())
        return found

    for a, b in zip(derivatives(m), derivatives(m.to_torch().double().float()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@every_backend
def test_gradient_penalty(backend: str) -> None:
    """A critic of sequences, trained to tell waves from noise with gradients of norm one (Gulrajani et al. 2017)."""
    torch.manual_seed(0)
    lstm, head = fused_lstm.LSTM(1, 8, backend=backend), nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-2)
    T, B = (12, 16) if backend != "triton" else (3, 4)
    norms = []
    for _ in range(60 if backend != "triton" else 2):
        real = 1 + torch.sin(torch.arange(T)[:, None, None] + 6 * torch.rand(B, 1))
        fake = torch.randn(T, B, 1)
        mixed = torch.lerp(real, fake, torch.rand(B, 1)).requires_grad_()
        real_score, fake_score, mixed_score = (head(lstm(x)[1][0][0]).squeeze(-1) for x in (real, fake, mixed))
        (gradient,) = torch.autograd.grad(mixed_score.sum(), mixed, create_graph=True)
        norm = gradient.flatten(0).view(T, B).norm(dim=0)
        loss = fake_score.mean() - real_score.mean() + 10 * (norm - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norms.append(norm.mean().item())
    if backend != "triton":
        assert abs(norms[-1] - 1) < 0.3 < abs(norms[0] - 1)
        assert real_score.mean() > fake_score.mean()


@every_backend
def test_hessian_vector_product_of_the_weights(backend: str) -> None:
    """Against the difference of two gradients, in fp32 on the kernels as well."""
    torch.manual_seed(0)
    m = fused_lstm.LSTM(2, 3, bidirectional=True, backend=backend)
    double = fused_lstm.LSTM(2, 3, bidirectional=True, dtype=torch.float64)
    double.load_state_dict(m.state_dict())
    x = torch.randn(4, 2, 2)
    vs = [torch.randn_like(p) for p in m.parameters()]

    def gradient(m: nn.Module, x: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(m(x, lengths=[4, 2])[0].square().sum(), list(m.parameters()), create_graph=create_graph)

    got = torch.autograd.grad(gradient(m, x, create_graph=True), list(m.parameters()), vs)
    step, sides = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, q, v in zip(double.parameters(), m.parameters(), vs, strict=True):
                p.copy_(q.double() + sign * step * v.double())
        sides.append(gradient(double, x.double()))
    for g, above, below in zip(got, *sides, strict=True):
        torch.testing.assert_close(g.double(), (above - below) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    """Mixed precision as it is trained: the loss falls, and a step with an overflow is left out."""
    torch.manual_seed(0)
    model = nn.ModuleList([fused_lstm.LSTM(2, 16), nn.Linear(16, 1)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 16, 2)
    losses = []
    for k in range(40):
        with torch.autocast("cpu", dtype):
            y, (h, c) = model[0](x)
            assert y.dtype == h.dtype == c.dtype == dtype
            loss = (model[1](y).float().squeeze(-1) - x.sum(-1).cumsum(0).tanh()).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss * (float("inf") if k == 20 else 1)).backward()
        before = model[0].weight_hh_l0.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[0].weight_hh_l0) == (k == 20)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
