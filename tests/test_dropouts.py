"""weight_drop and variational_dropout, against loops over steps with the same masks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, skip_unless_it_compiles
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_lstm
from fused_lstm import LSTM, variational_dropout, weight_drop

P = 0.25, 0.3, 0.4  # of input, between, output


def both(layer: LSTM) -> LSTM:
    return variational_dropout(weight_drop(layer, 0.5), *P)


def mask(p: float, *shape: int) -> Tensor:
    return F.dropout(torch.ones(shape, dtype=torch.float64, device=DEVICE), p)


def direction(
    x: Tensor, h: Tensor, c: Tensor, w: list[Tensor], lengths: Tensor, resets: Tensor, backwards: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of a layer: x (T, B, I), h (B, Hout), c (B, H), w_ih, w_hh, two biases, w_hr if projected."""
    ys = [h] * len(x)
    for t in reversed(range(len(x))) if backwards else range(len(x)):
        here = (t < lengths)[:, None]
        if not backwards or t + 1 < len(x):
            begins = (resets[t] if not backwards else resets[t + 1] & (t + 1 < lengths))[:, None]
            h, c = torch.where(begins & here, 0, h), torch.where(begins & here, 0, c)
        i, f, g, o = (x[t] @ w[0].t() + h @ w[1].t() + w[2] + w[3]).chunk(4, -1)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * c_new.tanh()
        h_new = h_new @ w[4].t() if len(w) > 4 else h_new
        ys[t] = torch.where(here, h_new, 0)
        h, c = torch.where(here, h_new, h), torch.where(here, c_new, c)
    return torch.stack(ys), h, c


def loop(layer: LSTM, x: Tensor, hx: tuple[Tensor, Tensor], lengths: Tensor, resets: Tensor) -> list[Tensor]:
    """The layer over x (T, B, I) by the definition of its masks, which are drawn in the order in which the layer says."""
    B, D, (h, c) = x.shape[1], 1 + layer.bidirectional, hx
    groups = [list(group) for group in layer.all_weights]
    for group in groups:
        group[1] = group[1] * mask(0.5, *group[1].shape)
    last = []
    for k in range(layer.num_layers):
        x = x * mask(P[1] if k else P[0], B, x.shape[-1])
        runs = range(k * D, (k + 1) * D)
        found = [direction(x, h[r], c[r], groups[r], lengths, resets, r % D == 1) for r in runs]
        x = torch.cat([y for y, _, _ in found], -1)
        last += [states for _, *states in found]
    h_n, c_n = (torch.stack(s) for s in zip(*last, strict=True))
    return [x * mask(P[2], B, x.shape[-1]), h_n, c_n]


# Options of the layer, T and B, and what the call is given; each of the ways on a CPU is taken by one of them.
CALLS: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "padded, both directions": ({"bidirectional": True}, 5, 3, {}),
    "batch first, projected": ({"batch_first": True, "proj_size": 2}, 4, 3, {}),
    "unbatched": ({}, 4, 1, {}),
    "a single step": ({}, 1, 3, {}),
    "recomputed": ({"recompute": True, "bidirectional": True}, 5, 3, {}),
    "one length": ({"batch_first": True}, 5, 3, {"lengths": [3, 3, 3]}),
    "lengths and resets": ({"bidirectional": True}, 5, 3, {"lengths": [2, 5, 0], "resets": [(1, 1), (3, 1), (3, 0)]}),
    "stretches between resets": ({}, 20, 13, {"resets": [(7, 2)]}),
    "packed": ({"bidirectional": True}, 6, 3, {"lengths": [6, 4, 1], "packed": True}),
}


@pytest.mark.parametrize("backend", ["auto", "aten", "reference", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_results_and_gradients_are_those_of_a_loop_with_the_same_masks(backend: str) -> None:
    skip_unless_it_compiles(torch.float64)
    for name, (options, T, B, given) in CALLS.items():
        if backend == "triton" and name not in ("lengths and resets", "packed"):
            continue  # the masks are torch's work, not the kernels'
        if backend == "aten" and "resets" in given and DEVICE == "cuda":
            continue  # which it does not take there
        torch.manual_seed(0)
        layer = both(LSTM(3, 4, 3, dtype=torch.float64, device=DEVICE, backend=backend, **options))
        D, numbers = 1 + layer.bidirectional, {"dtype": torch.float64, "device": DEVICE, "requires_grad": True}
        x = torch.randn(T, B, 3, **numbers)
        hx = torch.randn(3 * D, B, layer.proj_size or 4, **numbers), torch.randn(3 * D, B, 4, **numbers)
        lengths = torch.tensor(given.get("lengths", [T] * B), device=DEVICE)
        resets = torch.zeros(T, B, dtype=torch.bool, device=DEVICE)
        for t, b in given.get("resets", ()):
            resets[t, b] = True
        torch.manual_seed(1)
        expected = loop(layer, x, hx, lengths, resets)

        swap = x.transpose(0, 1) if layer.batch_first else x
        data = pack_padded_sequence(x, lengths.cpu()) if "packed" in given else swap.squeeze(1) if B == 1 else swap
        more = {k: v for k, v in {"lengths": lengths, "resets": resets}.items() if k in given and "packed" not in given}
        torch.manual_seed(1)
        y, (h_n, c_n) = layer(data, tuple(s.squeeze(1) if B == 1 else s for s in hx), **more)
        y = torch.nn.utils.rnn.pad_packed_sequence(y)[0] if "packed" in given else y
        y = y.transpose(0, 1) if layer.batch_first else y
        got = [t.view(e.shape) for t, e in zip((y, h_n, c_n), expected, strict=True)]

        cotangents = [torch.randn_like(t) for t in expected]
        inputs = [x, *hx, *layer.parameters()]
        exact = [*expected, *torch.autograd.grad(expected, inputs, cotangents)]
        for a, b in zip([*got, *torch.autograd.grad(got, inputs, cotangents)], exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_seeds_evaluation_and_who_draws_random_numbers() -> None:
    torch.manual_seed(0)
    plain = LSTM(3, 4, 2)
    layer, x = both(copy.deepcopy(plain)), torch.randn(5, 2, 3)
    state = torch.get_rng_state()
    plain(x)
    fused_lstm.explain(layer, x)
    fused_lstm.inspect_gates(layer, x)
    layer.eval()
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert torch.equal(torch.get_rng_state(), state)
    layer.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layer.zero_grad()
        layer(x)[0].sum().backward()
        runs.append([layer(x)[0], layer.step(x[0])[0], *(p.grad.clone() for p in layer.parameters())])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not any(map(torch.equal, runs[0][:3], runs[2][:3]))


def test_masks_are_constant_over_time_differ_between_rows_and_have_the_probability() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64, 32, requires_grad=True)
    layer = LSTM(32, 32, 2, bidirectional=True)
    y = layer(x)[0]
    ratio = (variational_dropout(layer, output=0.25)(x)[0] / y).detach()
    by_input = torch.autograd.grad(variational_dropout(variational_dropout(layer), 0.25)(x)[0].sum(), x)[0]
    for kept in (ratio.round(decimals=3), by_input != 0):
        assert torch.equal(kept, kept[:1].expand_as(kept))
        assert kept[0].unique(dim=0).shape[0] == 64
        share = (kept[0] != 0).float()
        assert abs(share.mean() - 0.75) < 5 * (0.25 * 0.75 / share.numel()) ** 0.5
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio, 4 / 3)[ratio != 0])

    weight_drop(variational_dropout(layer), 0.25)(x)[0].sum().backward()
    dropped = [w.grad == 0 for name, w in layer.named_parameters() if "weight_hh" in name]
    assert all(abs(d.float().mean() - 0.25) < 5 * (0.25 * 0.75 / d.numel()) ** 0.5 for d in dropped)
    assert len({d.numpy().tobytes() for d in dropped}) == 4


def test_under_compile_one_op_a_layer_and_new_masks_at_each_call() -> None:
    ops = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(n.target for n in graph.graph.nodes if n.target is torch.ops.fused_lstm.layer_forward.default)
        return graph

    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = both(LSTM(3, 4, 2)), torch.randn(5, 3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for given in (x, pack_padded_sequence(x, [5, 4, 2])):
        ops.clear()
        runs = []
        for run in (compiled, layer):
            torch.manual_seed(1)
            y, again = (y if given is x else y.data for y, _ in (run(given), run(given)))
            assert not torch.equal(y, again)
            runs.append(y)
        torch.testing.assert_close(*runs)
        assert len(ops) == 2


def test_what_a_layer_is_stays() -> None:
    plain = LSTM(3, 4, 2)
    layer, x = both(LSTM(3, 4, 2)), torch.randn(5, 2, 3)
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer.load_state_dict(plain.state_dict())
    assert "Dropouts(weight=0.5, input=0.25, between=0.3, output=0.4)" in repr(layer)
    results = []
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(1)
        results.append(one(x)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(TypeError, match=r"to_torch expects no dropout that nn.LSTM does not have"):
        layer.to_torch()
    assert variational_dropout(weight_drop(layer, 0)) is layer
    assert repr(layer) == repr(plain)
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert torch.equal(layer.to_torch().weight_hh_l1, plain.weight_hh_l1)


def test_errors() -> None:
    for wrong in (-0.1, 1.1, True, "0.5", None, float("nan")):
        with pytest.raises(ValueError, match=r"weight_drop: p should be a number in range \[0, 1\], got"):
            weight_drop(LSTM(3, 4), wrong)
        with pytest.raises(ValueError, match=r"variational_dropout: output should be a number in range \[0, 1\], got"):
            variational_dropout(LSTM(3, 4), output=wrong)
    with pytest.raises(TypeError, match=r"weight_drop expects a fused_lstm.LSTM, got: torch.nn.modules.rnn.LSTM"):
        weight_drop(torch.nn.LSTM(3, 4), 0.5)
    with pytest.raises(TypeError, match=r"variational_dropout expects a fused_lstm.LSTM, got: .*LSTMCell"):
        variational_dropout(fused_lstm.LSTMCell(3, 4), 0.5)
    layer = both(LSTM(3, 4, 2))
    with pytest.raises(ValueError, match=r"expects a layer without one, got .*weight_drop\(layer, 0\) takes it off"):
        weight_drop(layer, 0.5)
    with pytest.raises(ValueError, match="variational_dropout expects a layer without one"):
        variational_dropout(layer, output=0.1)
    with pytest.raises(ValueError, match=r"between takes the place of dropout, which should be 0, got 0.5"):
        variational_dropout(LSTM(3, 4, 2, dropout=0.5), between=0.5)
    with pytest.raises(ValueError, match=r"dropout should be 0 beside variational_dropout's between=0.3, got 0.5"):
        layer.dropout = 0.5
    with pytest.warns(UserWarning, match="between acts between stacked layers, and there is one layer"):
        variational_dropout(LSTM(3, 4), between=0.5)
