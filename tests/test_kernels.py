"""The Triton kernels, in Triton's interpreter or on a GPU, against the reference in fp64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan

import pytest
import torch
from checks import DEVICE, Rule
from pairs import all_equal
from problems import Problem
from torch import Tensor

pytest.importorskip("triton")
from fused_lstm import launch, recurrence, reference
from fused_lstm.call import Rows
from fused_lstm.launch.stepwise import StepwiseConfig

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's, on the way to saturation
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(problems: Sequence[Problem]) -> None:
    rule = Rule()
    for problem in problems:
        problem.add(rule)
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True])
def test_directions_layouts_and_projections(dtype: torch.dtype, mode: str, resets: bool) -> None:
    """All combinations in fp32, in other types every second one, so that every pair is there."""
    layouts = (False,) if mode == "packed" else (False, True)
    with launch.forced(StepwiseConfig(16, 16, 16)):
        check(
            [
                Problem(dtype, mode=mode, directions=directions, batch_first=batch_first, K=K, B=5, resets=resets)
                for n, directions in enumerate((1, -1, 2))
                for batch_first in layouts
                for K in (None, 3)
                if dtype == torch.float32 or (n + batch_first + bool(K) + resets) % 2 == 0
            ]
        )


@pytest.mark.parametrize(("H", "T"), [(1, 3), (20, 3), (519, 2), (650, 2), (1150, 2)])
def test_any_hidden_size_through_the_layer(H: int, T: int) -> None:
    import fused_lstm

    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, H)
    ours = fused_lstm.LSTM.from_torch(theirs, backend="triton")
    x = torch.randn(T, 2, 3)
    ours_on_device = copy.deepcopy(ours).to(DEVICE)
    exact_model = torch.nn.LSTM(3, H).double()
    exact_model.load_state_dict(theirs.state_dict())
    outputs = []
    for module, given in ((ours_on_device, x.to(DEVICE)), (theirs, x), (exact_model, x.double())):
        y, (h, c) = module(given)
        outputs.append([y, h, c, *torch.autograd.grad(y.sum() + (h * c).sum(), list(module.parameters()))])
    rule = Rule()
    names = ["y", "h_n", "c_n", *dict(theirs.named_parameters())]
    rule.add(H, names, *([t.detach().cpu() for t in r] for r in outputs))
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_tiny_and_saturating_numbers(dtype: torch.dtype, scale: float) -> None:
    """With B = 4, of the large ones none falls near zero, where numbers that cancel would leave nothing but rounding."""
    check([Problem(dtype, T=3, B=4, H=16, scale=scale)])


def test_infinite_and_nan_inputs_stay_in_their_row() -> None:
    problem = Problem(torch.float32, T=3, B=4)
    clean = problem.ours()
    x = problem.given.x
    x[1, 0], x[1, 1] = torch.inf, torch.nan
    found, expected = problem.ours(), problem.loops(torch.float32)
    for name in ("y", "h_n", "c_n"):
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)
        assert torch.equal(found[name][:, 2:], clean[name][:, 2:])
    assert found["y"][1:, 1].isnan().all()


def test_padding_may_hold_anything() -> None:
    problem = Problem(torch.float32, mode="lengths", B=5, directions=2)
    clean = problem.ours()
    x = problem.given.x
    padding = torch.arange(x.shape[0])[:, None] >= problem.given.lengths
    x[padding] = torch.nan
    dirty = problem.ours()
    for name in clean:
        if name != "dw_ih":  # the product with x itself
            assert torch.equal(clean[name], dirty[name]), name
    assert (dirty["y"][padding] == 0).all()
    assert (dirty["dx"][padding] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_equal_bits(dtype: torch.dtype) -> None:
    problem = Problem(dtype, B=20, H=48, directions=2)
    assert all_equal(list(problem.ours().values()), list(problem.ours().values()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_halves_equal_the_whole(dtype: torch.dtype) -> None:
    Problem(dtype, T=6, B=3, H=32).check_halves()


def test_inference_keeps_nothing_and_agrees_with_training() -> None:
    call = Problem(torch.float32, directions=2).call("triton", torch.float32)
    saved, plain = (recurrence.forward(call._replace(save=save)) for save in (True, False))
    assert plain.gates is plain.c is None
    assert all_equal(saved[:3], plain[:3])


def test_empty_batch() -> None:
    found = Problem(torch.float32, B=0).ours()
    assert found["y"].shape == (4, 0, 16)
    assert found["h_n"].shape == found["c_n"].shape == (1, 0, 16)
    assert found["dx"].shape == (4, 0, 5)
    for name in ("dw_hh", "db_ih", "db_hh"):
        assert not found[name].any()


CONFIGS = {
    "stepwise": StepwiseConfig(16, 16, 16),
    "wide": StepwiseConfig(16, 32, 64),
    "tall": StepwiseConfig(64, 16, 32),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_many_configurations(dtype: torch.dtype, name: str) -> None:
    problems = [
        Problem(dtype, T=3, B=20, H=48, directions=2),
        Problem(dtype, B=5, H=64, mode="lengths", directions=-1),
        Problem(dtype, B=5, H=16, mode="packed", directions=2, resets=True),
        Problem(dtype, B=5, H=32, K=3, mode="lengths", directions=1, resets=True),
    ]
    with launch.forced(CONFIGS[name]):
        check(problems)


def test_a_configuration_is_forced_for_one_block_of_code() -> None:
    """For each kernel one of its own, in every thread; the blocks may be nested."""
    outer, inner, rows = StepwiseConfig(16, 16, 32), StepwiseConfig(32, 16, 16), Rows(3, 2, False, 1)
    like = torch.zeros(1, device=DEVICE)

    def configs() -> tuple[StepwiseConfig, StepwiseConfig]:
        return tuple(launch.prepare(kernel, like, rows, 1, 16).config for kernel in ("forward", "backward"))

    usual = configs()
    with launch.forced(outer):
        with launch.forced(inner, outer), ThreadPoolExecutor(1) as pool:
            assert pool.submit(configs).result() == (inner, outer)
        assert configs() == (outer, outer)
        with pytest.raises(ZeroDivisionError), launch.forced(inner):
            raise ZeroDivisionError
        assert configs() == (outer, outer)
    assert configs() == usual


# --- The two recurrences alone, without the GEMMs around them


TILES = pytest.mark.parametrize("name", ["stepwise", "wide"])
WRITTEN = ("y", "h_n", "c_n", "gates", "c", "dgates", "h_prev", "dc0")


class Recurrence:
    """Inputs of the recurrences of both directions: ragged rows, some of no step, and resets."""

    def __init__(self, dtype: torch.dtype, H: int = 16) -> None:
        problem = Problem(dtype, I=None, B=8, H=H, directions=2, mode="lengths", resets=True)
        call = problem.call("triton", dtype)
        self.rows, self.shape = call.rows, (32, 2, H)
        self.gates, self.w_hh, self.b_hh = call.x.detach().view(32, 2, 4, H), call.w_hh.detach(), call.b_hh.detach()
        self.h0, self.c0 = call.h0.detach(), call.c0.detach()
        self.dy, self.dh_n, self.dc_n = (t.to(DEVICE, dtype) for t in problem.cotangents)
        t, b = self.rows.times_and_batch_rows(32, call.lengths.device)
        self.padding, self.without_steps = t >= call.lengths[b], call.lengths == 0

    def run(self, save: bool = True) -> dict[str, Tensor]:
        """All that is written, into memory that holds NaN before."""
        gates, dgates = self.gates.clone(), torch.full_like(self.gates, nan)
        y, h_prev, c_all = (self.gates.new_full(self.shape, nan) for _ in range(3))
        c_all = c_all if save else None
        h_n, c_n = launch.recurrence_forward(gates, self.w_hh, self.b_hh, self.h0, self.c0, self.rows, y, c_all)
        written = dict(zip(WRITTEN, (y, h_n, c_n, gates), strict=False))
        if c_all is not None:
            _, dc0 = launch.recurrence_backward(
                self.dy, self.dh_n, self.dc_n, gates, c_all, y, self.h0, self.c0, self.w_hh, self.rows, dgates, h_prev
            )
            written |= dict(zip(WRITTEN[4:], (c_all, dgates, h_prev, dc0), strict=True))
        return written


@TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [("b_hh", "h0", "c0", "dc_n"), ("dy", "dh_n")])
def test_none_is_zero(parts: tuple[str, ...], name: str, dtype: torch.dtype) -> None:
    """An initial state, a bias or a gradient that is None: the bits of a tensor of zeros in its place."""
    found, p = [], Recurrence(dtype)
    with launch.forced(CONFIGS[name]):
        for value in (0.0, None):
            for part in parts:
                setattr(p, part, None if value is None else torch.zeros_like(getattr(p, part)))
            found.append(p.run())
    zero, none = found
    assert none["dgates"].any()
    assert (none["dc0"] is None) == ("c0" in parts)
    for k in [k for k in WRITTEN if none[k] is not None]:
        assert torch.equal(none[k].nan_to_num(7), zero[k].nan_to_num(7)), k  # NaN is what nobody wrote


@TILES
@pytest.mark.parametrize("states", [True, False])
def test_padding_is_zero_and_rows_without_steps_hand_through(name: str, states: bool) -> None:
    p = Recurrence(torch.float32)
    if not states:
        p.h0 = p.c0 = p.dh_n = p.dc_n = None
    with launch.forced(CONFIGS[name]):
        found = p.run()
    for k in ("y", "dgates", "h_prev"):
        assert (found[k][p.padding] == 0).all(), k
        assert found[k].isfinite().all(), k
    for k, initial in (("h_n", p.h0), ("c_n", p.c0), ("dc0", p.dc_n)):
        if k == "dc0" and not states:
            assert found[k] is None
            continue
        through = found[k][:, p.without_steps]
        assert torch.equal(through, torch.zeros_like(through) if initial is None else initial[:, p.without_steps]), k


@TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_adds_the_bias_as_well_as_if_added_before(name: str, dtype: torch.dtype) -> None:
    rule, names = Rule(), ("y", "h_n", "c_n")
    p, before, exact = Recurrence(dtype, H=48), Recurrence(dtype, H=48), Recurrence(dtype, H=48)
    before.gates += before.b_hh.view_as(before.gates[0])
    before.b_hh = None
    tensors = [t.double().cpu() for t in (exact.gates, exact.w_hh, exact.b_hh, exact.h0, exact.c0)]
    rows = exact.rows._replace(lengths=exact.rows.lengths.cpu(), resets=exact.rows.resets.cpu())
    y = torch.empty(exact.shape, dtype=torch.float64)
    h_n, c_n = reference.recurrence_forward(*tensors, rows, y, None)
    with launch.forced(CONFIGS[name]):
        found = [[q.run(save=False)[k].cpu() for k in names] for q in (p, before)]
    rule.add(name, names, *found, (y, h_n, c_n))
    rule.check()
