"""lengths= and resets= on every backend, against nn.LSTM run on each row's episodes one by one."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from checks import CPU_WAYS, DEVICE, KERNELS_WAYS, RAGGED, Config, Rule, add_config, results
from pairs import every_backend
from torch import Tensor, nn

import fused_lstm
from fused_lstm.cpu import aten, ragged

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
BACKENDS = ["aten", "reference", pytest.param("triton", marks=pytest.mark.kernels)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("nan_memory")
def test_300_random_lengths_and_resets(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, and cut wherever a row ends, where cuts cost nothing."""
    rules, cut, found = {way: Rule() for way in CPU_WAYS}, Rule(), ragged.cuts
    blocks: list[list[int]] = []
    for seed in range(DTYPES.index(dtype), 300, len(DTYPES)):
        config = Config.random(seed, dtype, 17, RAGGED)
        add_config(rules, config)
        with monkeypatch.context() as free:
            for cost in ("STEP_COST", "CALL_COST", "CALL_COST_TIMES_H", "CUT_COST_TIMES_H"):
                free.setattr(ragged, cost, 0)
            free.setattr(ragged, "cuts", lambda *args: blocks.append(found(*args)) or blocks[-1])
            add_config({("aten", False): cut}, config)
    for rule in (*rules.values(), cut):
        rule.check()
    assert sum(len(marks) > 2 for marks in blocks) > 20


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("nan_memory")
def test_160_random_lengths_and_resets_on_the_kernels(dtype: torch.dtype) -> None:
    """With recompute and without it in turn: the kernels are the same."""
    rule = Rule()
    for n, seed in enumerate(range(DTYPES.index(dtype), 160, len(DTYPES))):
        add_config({KERNELS_WAYS[n % 2]: rule}, Config.random(seed, dtype, 17, RAGGED))
    rule.check()


def test_cuts_take_the_least_time() -> None:
    """Against all ways to cut."""
    seen = set()
    for seed in range(200):
        r = random.Random(seed)
        B, H, steps = r.randint(1, 9), r.choice([64, 128, 512]), r.choice([30, 300, 2000])
        ends = [r.randint(0, r.choice([steps, steps // 4])) for _ in range(B)]
        call, once = ragged.CALL_COST + ragged.CALL_COST_TIMES_H // H, ragged.CUT_COST_TIMES_H // H

        def cost(way: tuple[int, ...], call: int = call, ends: list[int] = ends) -> int:
            return sum(
                call + (b - a) * (sum(e > a or a == 0 for e in ends) + ragged.STEP_COST) for a, b in pairwise((0, *way))
            )

        marks = sorted({*ends} - {0})
        ways = [(*some, marks[-1]) for n in range(len(marks)) for some in combinations(marks[:-1], n)]
        whole, got = call + steps * (B + ragged.STEP_COST), ragged.cuts(torch.tensor(ends), steps, H)
        seen.add(len(got))
        if got == [0, steps]:
            assert all(cost(way) + once > 0.95 * whole for way in ways)
        else:
            assert got[0] == 0
            assert cost(tuple(got[1:])) == min(map(cost, ways))
            assert cost(tuple(got[1:])) + once <= 0.95 * whole
    assert {2, 3, 4} <= seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_padding_holds_does_not_matter(backend: str) -> None:
    for seed in range(12 if backend == "triton" else 28):
        config = Config.random(seed, torch.float64, 17, ("lengths", "lengths and resets"))
        lstm = fused_lstm.LSTM.from_torch(config.module(), backend=backend)

        def dirty(x: Tensor, *args: Any, lengths: Tensor, lstm: nn.Module = lstm, **more: Any) -> Any:
            padding = torch.arange(x.shape[lstm.batch_first], device=x.device) >= lengths[:, None]
            padding = (padding if lstm.batch_first else padding.t())[..., None]
            return lstm(x.masked_fill(padding, torch.nan), *args, lengths=lengths, **more)

        device = DEVICE if backend == "triton" else "cpu"
        names, clean = results(lstm, config, torch.float64, device)
        for name, a, b in zip(names, clean, results(lstm, config, torch.float64, device, dirty)[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def packed(lstm: nn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor], lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    given = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, (h_n, c_n) = lstm(given, hx)
    return nn.utils.rnn.pad_packed_sequence(y, total_length=x.shape[0])[0], h_n, c_n


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_are_packed_sequences(backend: str) -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 6, 2, bidirectional=True).double()
    device = DEVICE if backend == "triton" else "cpu"
    ours = fused_lstm.LSTM.from_torch(theirs, backend=backend)
    x, lengths = torch.randn(6, 4, 5).double(), torch.tensor([3, 6, 1, 4])
    hx = (torch.randn(4, 4, 6).double(), torch.randn(4, 4, 6).double())
    expected = packed(theirs, x, hx, lengths)
    ours.to(device)
    for given in (lengths, lengths.tolist(), lengths.int()):
        y, states = ours(x.to(device), tuple(s.to(device) for s in hx), lengths=given)
        for a, b in zip((y, *states), expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resets", [torch.ones, torch.zeros], ids=["at every step", "never"])
def test_all_or_no_resets(backend: str, resets) -> None:
    torch.manual_seed(0)
    device = DEVICE if backend == "triton" else "cpu"
    lstm = fused_lstm.LSTM(5, 6, bidirectional=True, dtype=torch.float64, backend=backend).to(device)
    x, hx = torch.randn(4, 3, 5).double().to(device), torch.randn(2, 2, 3, 6).double().to(device)
    y, (h_n, _) = lstm(x, tuple(hx), resets=resets(4, 3).to(device))
    if resets is torch.zeros:
        expected, (h, _) = lstm(x, tuple(hx))
        torch.testing.assert_close(h_n, h, rtol=1e-12, atol=1e-13)
    else:  # every step alone; hx meets the reverse direction at the last step only
        alone = torch.cat([lstm(x[t : t + 1])[0] for t in range(4)])
        last, _ = lstm(x[3:], (torch.stack((hx[0][0] * 0, hx[0][1])), torch.stack((hx[1][0] * 0, hx[1][1]))))
        expected = torch.cat((alone[:3], last))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_and_number_dtypes(backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    lstm = fused_lstm.LSTM(3, 4, dtype=torch.float64, backend=backend).to(device)
    x, resets = torch.randn(5, 3).double().to(device), torch.tensor([0, 0, 1, 0, 1]).to(device)
    expected = torch.cat([lstm(part)[0] for part in x.split((2, 2, 1))])
    for given in (resets, resets.bool(), resets.double(), resets.to(torch.uint8)):
        torch.testing.assert_close(lstm(x, resets=given)[0], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_step_with_resets_is_a_cell(bidirectional: bool) -> None:
    lstm = fused_lstm.LSTM(3, 4, bidirectional=bidirectional, dtype=torch.float64)
    reference = fused_lstm.LSTM.from_torch(lstm.to_torch(), backend="reference")
    D = 2 if bidirectional else 1
    x, hx, resets = torch.randn(1, 3, 3).double(), tuple(torch.randn(2, D, 3, 4).double()), torch.tensor([[1, 0, 1]])
    assert fused_lstm.explain(lstm, x, hx, resets=resets).how == "cell"
    y, _ = lstm(x, hx, resets=resets)
    slow, _ = reference(torch.cat((x, x)), hx, resets=torch.cat((resets, resets * 0 + 1)))
    torch.testing.assert_close(y[..., :4], slow[:1, :, :4])
    if not bidirectional:
        return
    alone, _ = lstm(x, tuple(torch.where(torch.tensor([True, False])[:, None, None], 0, s) for s in hx))
    torch.testing.assert_close(y[..., 4:], alone[..., 4:])


BAD = {
    "lengths should have shape (3,), one for each batch row, got (2,)": dict(lengths=[1, 2]),
    "lengths should be between 0 and T = 4, got 1 to 5": dict(lengths=[1, 5, 2]),
    "lengths should be between 0 and T = 4, got -1 to 2": dict(lengths=torch.tensor([1, -1, 2])),
    "lengths should be integers, got dtype torch.float32": dict(lengths=torch.ones(3)),
    "resets should have shape (4, 3), the input's without its features, got (3, 4)": dict(resets=torch.zeros(3, 4)),
    "resets should be a tensor of shape (4, 3), got list": dict(resets=[0, 1]),
    "resets should be bool, integer or float, got dtype torch.complex64": dict(resets=torch.zeros(4, 3) * 1j),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(message: str) -> None:
    lstm = fused_lstm.LSTM(2, 3)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        lstm(torch.zeros(4, 3, 2), **BAD[message])
    assert str(error.value) == message


@pytest.mark.parametrize("given", [dict(lengths=[2, 1]), dict(resets=torch.zeros(2, 2))])
def test_packed_input_takes_neither(given: dict) -> None:
    x = nn.utils.rnn.pack_sequence([torch.zeros(2, 2), torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="pass the padded tensor and lengths= instead"):
        fused_lstm.LSTM(2, 3)(x, **given)


def test_second_derivative_with_both() -> None:
    torch.manual_seed(0)
    lstm = fused_lstm.LSTM(2, 3, bidirectional=True, dtype=torch.float64, backend="reference")
    lengths, resets = torch.tensor([3, 1]), torch.tensor([[0, 1], [1, 0], [0, 0]])
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: lstm(x, lengths=lengths, resets=resets)[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_states_and_nan_in_the_cut_off_part(backend: str) -> None:
    torch.manual_seed(0)
    device = DEVICE if backend == "triton" else "cpu"
    lstm = fused_lstm.LSTM(3, 4, dtype=torch.float64, backend=backend).to(device)
    x = torch.randn(4, 2, 3).double().to(device).requires_grad_()
    hx = tuple((torch.randn(2, 1, 2, 4).double() * 1e7).to(device))
    y, (h_n, c_n) = lstm(x, hx, lengths=[0, 2])
    assert not y[:, 0].any()
    assert not y[2:].any()
    assert torch.equal(h_n[:, 0], hx[0][:, 0])
    assert torch.equal(c_n[:, 0], hx[1][:, 0])
    cotangent = torch.ones_like(y)
    cotangent[2:], cotangent[:, 0] = torch.nan, torch.nan
    (dx,) = torch.autograd.grad(y, x, cotangent)
    assert dx.isfinite().all()
    nan = tuple(torch.full_like(s, torch.nan) for s in hx)
    first = torch.zeros(4, 2)
    first[0] = 1
    torch.testing.assert_close(lstm(x, nan, resets=first.to(device))[0], lstm(x)[0])


@pytest.mark.parametrize("lengths", ["abc", [1, None, 2], [2**70, 1, 1]])
def test_lengths_that_are_no_integers(lengths: object) -> None:
    with pytest.raises(ValueError, match="lengths should be 3 integers from 0 to 4, got"):
        fused_lstm.LSTM(2, 3)(torch.zeros(4, 3, 2), lengths=lengths)


def test_lengths_of_an_empty_batch() -> None:
    y, _ = fused_lstm.LSTM(2, 3)(torch.zeros(4, 0, 2), lengths=[])
    assert y.shape == (4, 0, 3)


@pytest.mark.parametrize("lengths", [[40, 2, 1, 0, 3, 2, 1, 1], [3, 38, 2, 2, 40, 1, 1, 2], [7] * 8, [40] * 8], ids=str)
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("layer", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}], ids=["", "stacked"])
def test_few_long_rows_and_equal_ones(lengths: list[int], resets: bool, layer: dict[str, Any]) -> None:
    """Which torch's LSTM runs apart from the others, or as plain data; against the explicit path, padding full of NaN."""
    torch.manual_seed(0)
    ours = fused_lstm.LSTM(3, 4, **layer, backend="aten", dtype=torch.float64)
    explicit = fused_lstm.LSTM(3, 4, **layer, backend="reference", dtype=torch.float64)
    explicit.load_state_dict(ours.state_dict())
    x = torch.randn(8, 40, 3).double()
    begins = (torch.rand(8, 40) < 0.2) if resets else None
    x[torch.arange(40) >= torch.tensor(lengths)[:, None]] = torch.nan
    if not ours.batch_first:
        x, begins = x.transpose(0, 1), None if begins is None else begins.t()
    found = []
    for module in (ours, explicit):
        given = x.clone().requires_grad_()
        y, states = module(given, lengths=lengths, resets=begins)
        inputs = [given, *module.parameters()]
        loss = y.square().sum() + sum(s.sin().sum() for s in states)
        found.append([y, *states, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [{}, {"num_layers": 2, "proj_size": 2, "batch_first": True}], ids=["", "stacked"])
@pytest.mark.parametrize("often", [0.0, 0.01, 1.0])
def test_resets_of_many_rows(often: float, layer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are run piece by piece; against the explicit path."""
    torch.manual_seed(0)
    lstm = fused_lstm.LSTM(3, 4, **layer, backend="aten", dtype=torch.float64)
    explicit = fused_lstm.LSTM(3, 4, **layer, backend="reference", dtype=torch.float64)
    explicit.load_state_dict(lstm.state_dict())
    resets, x = torch.rand(6, 200) < often, torch.randn(6, 200, 3).double()
    hx = tuple(torch.randn(lstm.num_layers, 200, n).double() for n in (lstm.proj_size or 4, 4))
    if lstm.batch_first:
        x, resets = x.transpose(0, 1), resets.t()
    pieces: list[int] = []
    real = aten.fused
    monkeypatch.setattr(aten, "fused", lambda x, *args: pieces.append(x.shape[0]) or real(x, *args))
    found = []
    for module in (lstm, explicit):
        given = x.clone().requires_grad_()
        y, states = module(given, hx, resets=resets)
        loss = y.square().sum() + sum(s.sin().sum() for s in states)
        found.append([y, *states, *torch.autograd.grad(loss, [given, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert pieces == {0.0: [6], 1.0: [1] * 6}.get(often, pieces)
    assert sum(pieces) == 6
    assert fused_lstm.explain(lstm, x, hx, resets=resets).how == "stretches"
    few = torch.ones(6, 9, dtype=torch.bool)
    plan = fused_lstm.explain(
        lstm,
        torch.zeros(9, 6, 3).double() if lstm.batch_first else torch.zeros(6, 9, 3).double(),
        resets=few.t() if lstm.batch_first else few,
    )
    assert plan.how == "ragged", "few rows have control columns"


@every_backend
@pytest.mark.parametrize("recompute", [False, True])
def test_a_nan_cotangent_past_a_length_reaches_no_gradient(backend: str, recompute: bool) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, proj_size=2, bidirectional=True, backend=backend, recompute=recompute)
    x, lengths = torch.randn(5, 3, 3, requires_grad=True), torch.tensor([5, 2, 0])
    y = layer(x, lengths=lengths)[0]
    past = (torch.arange(5)[:, None] >= lengths)[..., None]
    by = [x, *layer.parameters()]
    poisoned, clean = (torch.ones_like(y).masked_fill(past, value) for value in (torch.nan, 0))
    poisoned, clean = (torch.autograd.grad(y, by, g, retain_graph=True) for g in (poisoned, clean))
    for a, b in zip(poisoned, clean, strict=True):
        assert torch.equal(a, b)
