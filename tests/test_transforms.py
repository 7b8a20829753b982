"""vmap, torch.func and forward-mode AD, on every backend, against loops, autograd and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pairs import all_equal, every_backend
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import fused_lstm
from fused_lstm import ops

E, T, B, I, H = 3, 4, 2, 3, 4  # noqa: E741
LAYERS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"proj_size": 2, "bidirectional": True, "bias": False},
    {"recompute": True, "batch_first": True},
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=["plain", "bidirectional", "projection", "recompute"])


def make(backend: str, layer: dict[str, Any]) -> fused_lstm.LSTM:
    torch.manual_seed(0)
    # The interpreter has no fp64 under Triton 3.6; what is tested here is not rounding.
    return fused_lstm.LSTM(I, H, **layer, backend=backend, dtype=torch.float32 if backend == "triton" else torch.float64)


def data(module: fused_lstm.LSTM, *members: int) -> Tensor:
    shape = (B, T) if module.batch_first else (T, B)
    return torch.randn(*members, *shape, I, dtype=module.weight_ih_l0.dtype)


def close(ours: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4 if b.dtype == torch.float32 else 1e-9, atol=1e-5 if b.dtype == torch.float32 else 1e-10
        )


def stacked(results: Sequence[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


def loss(result: tuple[Tensor, tuple[Tensor, Tensor]]) -> Tensor:
    y, (h, c) = result
    return y.square().sum() + (h.sum() * c).sum()


@every_layer
@every_backend
class TestVmap:
    def test_over_inputs(self, backend: str, layer: dict[str, Any]) -> None:
        m = make(backend, layer)
        x = data(m, E)
        close(vmap(m)(x), stacked([m(x[e]) for e in range(E)]))
        close(vmap(m, 2, 1)(x.movedim(0, 2))[0], stacked([m(x[e])[0] for e in range(E)]).movedim(0, 1))

    def test_over_states(self, backend: str, layer: dict[str, Any]) -> None:
        m = make(backend, layer)
        x, D = data(m), 2 if m.bidirectional else 1
        h, c = (torch.randn(E, D * m.num_layers, B, size, dtype=x.dtype) for size in (m.proj_size or H, H))
        expected = [m(x, (h[e], c[e])) for e in range(E)]
        close(vmap(lambda h, c: m(x, (h, c)))(h, c), stacked(expected))

    def test_over_lengths_and_resets(self, backend: str, layer: dict[str, Any]) -> None:
        m = make(backend, layer)
        x, lengths = data(m, E), torch.randint(0, T + 1, (E, B))
        resets = torch.rand(x.shape[:-1]) < 0.4
        expected = [m(x[e], lengths=lengths[e], resets=resets[e]) for e in range(E)]
        close(vmap(lambda x, n, r: m(x, lengths=n, resets=r))(x, lengths, resets), stacked(expected))
        close(vmap(lambda n: m(x[0], lengths=n))(lengths), stacked([m(x[0], lengths=n) for n in lengths]))

    def test_over_weights(self, backend: str, layer: dict[str, Any]) -> None:
        """An ensemble, on one input and on an input for each member, and each member's gradients."""
        members = [make(backend, layer) for _ in range(E)]
        for k, m in enumerate(members):
            torch.nn.init.uniform_(m.weight_hh_l0, -0.5, 0.5, generator=torch.Generator().manual_seed(k))
        weights, _ = stack_module_state(members)
        m, x = members[0], data(members[0], E)

        def call(weights: dict[str, Tensor], x: Tensor, lengths: Tensor | None = None) -> Any:
            return functional_call(m, weights, (x,), {"lengths": lengths})

        close(vmap(call, (0, None))(weights, x[0]), stacked([k(x[0]) for k in members]))
        close(vmap(call)(weights, x), stacked([k(x[e]) for e, k in enumerate(members)]))
        lengths = torch.randint(0, T + 1, (E, B))
        close(vmap(call)(weights, x, lengths), stacked([k(x[e], lengths=lengths[e]) for e, k in enumerate(members)]))

        names = list(weights)
        each = [torch.autograd.grad(loss(k(x[e])), list(k.parameters())) for e, k in enumerate(members)]
        expected = stacked([dict(zip(names, g, strict=True)) for g in each])
        close(vmap(grad(lambda w, x: loss(call(w, x))))(weights, x), expected)
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        total = vmap(lambda w, x: loss(call(w, x)))(leaves, x).sum()
        close(dict(zip(names, torch.autograd.grad(total, list(leaves.values())), strict=True)), expected)

    def test_per_sample_gradients(self, backend: str, layer: dict[str, Any]) -> None:
        m = make(backend, layer)
        x, weights = data(m, E), dict(m.named_parameters())
        each = [torch.autograd.grad(loss(m(x[e])), list(weights.values())) for e in range(E)]
        expected = stacked([dict(zip(weights, g, strict=True)) for g in each])
        close(vmap(grad(lambda w, x: loss(functional_call(m, w, (x,)))), (None, 0))(weights, x), expected)

    def test_nested(self, backend: str, layer: dict[str, Any]) -> None:
        m = make(backend, layer)
        x = data(m, E, 2)
        close(vmap(vmap(m))(x), stacked([stacked([m(x[e, f]) for f in range(2)]) for e in range(E)]))


@every_layer
@every_backend
class TestDerivatives:
    def test_jacobians_and_hessian(self, backend: str, layer: dict[str, Any]) -> None:
        m = make(backend, layer)
        x = data(m)[:2, :2]

        def f(x: Tensor) -> Tensor:
            return m(x)[0].sum((0, 1))

        expected = torch.autograd.functional.jacobian(f, x)
        close(jacrev(f)(x), expected)
        close(jacfwd(f)(x), expected)

        def g(x: Tensor) -> Tensor:
            return loss(m(x))

        expected = torch.autograd.functional.hessian(g, x)
        for second in (hessian, lambda g: jacrev(jacrev(g)), lambda g: jacrev(jacfwd(g)), lambda g: jacfwd(jacfwd(g))):
            close(second(g)(x), expected)

    def test_forward_mode(self, backend: str, layer: dict[str, Any]) -> None:
        """By inputs, states, weights at once: the two ways to ask for it agree, and with finite differences in fp64."""
        m = make(backend, layer)
        x, D = data(m), 2 if m.bidirectional else 1
        states = [torch.randn(D * m.num_layers, B, size, dtype=x.dtype) for size in (m.proj_size or H, H)]
        lengths, weights = torch.randint(0, T + 1, (B,)), {k: v.detach() for k, v in m.named_parameters()}

        def f(x: Tensor, h: Tensor, c: Tensor, w: dict[str, Tensor]) -> Any:
            return functional_call(m, w, (x, (h, c)), {"lengths": lengths})

        primals = (x, *states, weights)
        tangents = tree_map(torch.randn_like, primals)
        outputs, got = jvp(f, primals, tangents)
        close(outputs, f(*primals))
        with forward_ad.dual_level():
            duals = tree_map(forward_ad.make_dual, primals, tangents)
            close(tree_map(lambda t: forward_ad.unpack_dual(t).tangent, f(*duals)), got)
        if x.dtype == torch.float64:
            step = 1e-6
            above, below = (f(*tree_map(lambda p, t, s=s: p + s * t, primals, tangents)) for s in (step, -step))
            difference = tree_map(lambda a, b: (a - b) / (2 * step), above, below)
            for a, b in zip(tree_leaves(got), tree_leaves(difference), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_hessian_vector_product(self, backend: str, layer: dict[str, Any]) -> None:
        """Forward over reverse, reverse over reverse."""
        m = make(backend, layer)
        x = data(m)
        v = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(m(leaf)), leaf, create_graph=True)
        (expected,) = torch.autograd.grad(first, leaf, v)
        close(jvp(grad(lambda x: loss(m(x))), (x,), (v,))[1], expected)
        close(grad(lambda x: (grad(lambda x: loss(m(x)))(x) * v).sum())(x), expected)


@every_backend
def test_packed_data_is_mapped(backend: str) -> None:
    m = make(backend, {"bidirectional": True})
    sizes = torch.tensor([3, 2, 2, 1])
    x = torch.randn(E, 8, I, dtype=m.weight_ih_l0.dtype)

    def f(x: Tensor) -> Any:
        y, states = m(PackedSequence(x, sizes))
        return y.data, states

    close(vmap(f)(x), stacked([f(x[e]) for e in range(E)]))
    close(vmap(grad(lambda x: f(x)[0].square().sum()))(x), stacked([grad(lambda x: f(x)[0].square().sum())(t) for t in x]))


@every_backend
def test_a_dropout_mask_for_each_member(backend: str) -> None:
    torch.manual_seed(0)
    m = fused_lstm.LSTM(I, H, num_layers=2, dropout=0.5, backend=backend)
    x = torch.randn(T, B, I).expand(E, -1, -1, -1)
    y = vmap(m, randomness="different")(x)[0]
    assert not torch.equal(y[0], y[1])
    y = vmap(m, randomness="same")(x)[0]
    assert all_equal([y[0]], [y[1]])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(m)(x)


def test_lengths_out_of_range_are_noticed_under_vmap() -> None:
    m, x = fused_lstm.LSTM(I, H), torch.randn(T, B, I)
    with pytest.raises(ValueError, match="between 0 and T = 4, got 1 to 5"):
        vmap(lambda n: m(x, lengths=n))(torch.tensor([[1, 2], [5, 2]]))


@pytest.mark.parametrize("engine_name", ["reference", "onednn"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_op_itself_is_mapped(engine_name: str, batch_first: bool) -> None:
    """With its input weights, as a compiled graph calls it: folded where that can be, else member by member."""
    torch.manual_seed(0)
    x, h0, c0 = torch.randn(E, 5, 5, I), torch.randn(E, 2, 5, H), torch.randn(2, 5, H)
    w_ih, w_hh, b = torch.randn(E, 2 * 4 * H, I), torch.randn(E, 2 * 4 * H, H), torch.randn(2, 2 * 4 * H)
    lengths = torch.randint(0, 6, (E, 5))

    def f(
        x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, lengths: Tensor | None, call: Callable = ops.layer_forward
    ) -> tuple[Tensor, ...]:
        ragged = (lengths, None, None, None)
        return call(x, h0, c0, w_ih, w_hh, *b, None, None, *ragged, 2, batch_first, True, engine_name, False, "")[:3]

    def g(*args: Any) -> Any:
        return grad(lambda *a: sum(t.square().sum() for t in f(*a, ops.MappedLayerFunction.apply)), (0, 1, 2, 3))(*args)

    def members(dims: tuple[int | None, ...], args: tuple[Any, ...], f: Callable) -> Any:
        return stacked([f(*(a if d is None else a[e] for a, d in zip(args, dims, strict=True))) for e in range(E)])

    whole, one = (x, h0, w_ih, w_hh, lengths), (x[0], h0[0], w_ih[0], w_hh[0], None)
    for mapped in ((0,), (1,), (2, 3), (0, 2, 3), (0, 4), (0, 2, 3, 4)):
        dims = tuple(0 if k in mapped else None for k in range(5))
        args = tuple(w if d == 0 else o for w, o, d in zip(whole, one, dims, strict=True))
        for function in (f, g):
            close(vmap(function, dims)(*args), members(dims, args, function))


def test_no_members() -> None:
    with pytest.raises(ValueError, match="vmap over a dimension of size 0"):
        vmap(fused_lstm.LSTM(I, H))(torch.randn(0, T, B, I))
