"""The op's oneDNN engine against the explicit one: results, first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from pairs import all_equal
from problems import Problem, check_ops, inputs

from fused_lstm import ops

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
KINDS = {"": {}, "lengths": {"mode": "lengths"}, "resets": {"resets": True}, "packed": {"mode": "packed"}}
BOTH = "lengths and resets"
EVERY = KINDS | {BOTH: {"mode": "lengths", "resets": True}}


def problem(ragged: str, directions: int, batch_first: bool) -> Problem:
    sizes = {"T": 5, "B": 4, "I": 3, "H": 6, "scale": 1.0}
    return Problem(torch.float32, **sizes, directions=directions, batch_first=batch_first, **EVERY[ragged])


@pytest.mark.parametrize("ragged", EVERY)
@pytest.mark.parametrize("directions", [1, -1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_as_the_explicit_engine(ragged: str, directions: int, batch_first: bool, recompute: bool) -> None:
    found, given = [], problem(ragged, directions, batch_first)
    for engine in ("onednn", "reference"):
        call = given.call(engine, torch.float32, recompute=recompute)
        outputs, by = ops.layer(call)[:3], list(inputs(call).values())
        first = torch.autograd.grad(outputs, by, [c.float() for c in given.cotangents], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), by)
        found.append([*outputs, *first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("ragged", KINDS)
def test_opcheck(ragged: str) -> None:
    # All but a comparison of what is saved, where there are bytes that oneDNN does not write.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    # But for the schema: oneDNN writes into its workspace, as scratch that no later call reads.
    check_ops(problem(ragged, 2, True).call("onednn", torch.float32), utils, utils[1:])


@pytest.mark.parametrize("ragged", ["", BOTH])
def test_backward_repeats(ragged: str) -> None:
    """From one workspace, and with other cotangents in between."""
    call = problem(ragged, 2, False).call("onednn", torch.float32)
    y = ops.layer(call)[0]
    by, other = torch.randn_like(y), torch.randn_like(y)
    first, _, third = (torch.autograd.grad(y, list(inputs(call).values()), g, retain_graph=True) for g in (by, other, by))
    assert all_equal(first, third)


def test_an_input_for_each_member() -> None:
    """Two members of two directions each, whose inputs stand side by side."""
    torch.manual_seed(0)
    T, B, I, H = 5, 4, 3, 6  # noqa: E741
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
