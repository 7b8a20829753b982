"""The op's oneDNN engine against the explicit one: results, first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_lstm import ops
from fused_lstm.call import LayerCall

T, B, I, H = 5, 4, 3, 6  # noqa: E741
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def problem(ragged: str, directions: int, batch_first: bool) -> tuple[list[Tensor | None], tuple]:
    torch.manual_seed(0)
    R = abs(directions)
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    lengths = batch_sizes = resets = None
    if "lengths" in ragged:
        lengths = torch.tensor([5, 0, 3, 2])
        x = torch.where((torch.arange(T) < lengths[:, None])[..., None], x if batch_first else x.transpose(0, 1), 0)
        x = x if batch_first else x.transpose(0, 1).contiguous()
    if "resets" in ragged:
        resets = torch.rand(x.shape[:2]) < 0.4
    if ragged == "packed":
        batch_sizes = torch.tensor([4, 3, 3, 1, 1])
        x = torch.randn(12, I)
    shapes = (R, B, H), (R, B, H), (R * 4 * H, I), (R * 4 * H, H), (R * 4 * H,), (R * 4 * H,)
    tensors = [t.requires_grad_() for t in (x, *(torch.randn(s) for s in shapes))]
    return [*tensors, None, None], (lengths, batch_sizes, resets, None, directions, batch_first)


@pytest.mark.parametrize("ragged", ["", "lengths", "resets", "lengths and resets", "packed"])
@pytest.mark.parametrize("directions", [1, -1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_as_the_explicit_engine(ragged: str, directions: int, batch_first: bool, recompute: bool) -> None:
    found = []
    for engine in ("onednn", "reference"):
        tensors, options = problem(ragged, directions, batch_first)
        inputs = [t for t in tensors if t is not None]
        results = ops.layer(LayerCall(*tensors, *options, True, engine, recompute))[:3]
        cotangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in results]
        first = torch.autograd.grad(results, inputs, cotangents, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append([*results, *first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("ragged", ["", "lengths", "resets", "packed"])
def test_opcheck(ragged: str) -> None:
    tensors, options = problem(ragged, 2, True)
    # All but a comparison of what is saved, where there are bytes that oneDNN does not write.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.layer_forward, (*tensors, *options, True, "onednn", False, ""), test_utils=utils)
    with torch.no_grad():
        y, h_n, c_n, workspace, c_all = ops.layer_forward(*tensors, *options, True, "onednn", False, "")
    needs = [t is not None for t in tensors]
    args = (y, h_n, c_n, *tensors, *options, True, "onednn", False, "", y, workspace, c_all, needs)
    # But for the schema: oneDNN writes into its workspace, as scratch that no later call reads.
    torch.library.opcheck(ops.layer_backward, args, test_utils=utils[1:])


@pytest.mark.parametrize("ragged", ["", "lengths and resets"])
def test_backward_repeats(ragged: str) -> None:
    """From one workspace, and with other cotangents in between."""
    tensors, options = problem(ragged, 2, False)
    inputs = [t for t in tensors if t is not None]
    y = ops.layer(LayerCall(*tensors, *options, True, "onednn", False))[0]
    by, other = torch.randn_like(y), torch.randn_like(y)
    first, _, third = (torch.autograd.grad(y, inputs, g, retain_graph=True) for g in (by, other, by))
    for a, b in zip(first, third, strict=True):
        assert torch.equal(a, b)


def test_an_input_for_each_member() -> None:
    """Two members of two directions each, whose inputs stand side by side."""
    torch.manual_seed(0)
    x, state = torch.randn(T, B, 2, I), torch.randn(4, B, H)
    w_ih, w_hh = torch.randn(4 * 4 * H, I), torch.randn(4 * 4 * H, H)
    options = (*[None] * 8, 2, False, False, "onednn", False, "")
    y, h_n, c_n, _, _ = ops.layer_forward(x.flatten(2), state, state, w_ih, w_hh, *options)
    for member in range(2):
        r = slice(2 * member, 2 * member + 2)
        w = (w.chunk(2)[member] for w in (w_ih, w_hh))
        alone = ops.layer_forward(x[:, :, member], state[r], state[r], *w, *options)
        for a, b in zip((y.unflatten(-1, (2, -1))[:, :, member], h_n[r], c_n[r]), alone[:3], strict=True):
            assert torch.equal(a, b)
