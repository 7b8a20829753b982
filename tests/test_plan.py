"""Which backend runs a call: choose_backend on hand-made problems, explain on real calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import all_equal, failure, flat, randn, states
from torch.nn.utils.rnn import pack_sequence

import fused_lstm
from fused_lstm import functional
from fused_lstm import plan as plans
from fused_lstm.call import OnGPU
from fused_lstm.plan import FLOATS, Plan, Problem, Way, choose

UNSUPPORTED = (torch.complex64, torch.int32, torch.float8_e4m3fn)
X = randn(5, 2, 3, dtype=torch.float32)


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    """Calls remember their plans, and these tests change what plans are made of."""
    functional._chosen.cache_clear()
    yield
    functional._chosen.cache_clear()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool | None], None]:
    """Sets what dispatch believes of Triton: compiled (False), interpreted (True) or not installed (None)."""
    monkeypatch.setattr(plans, "fp64_compiles", lambda: True)
    return lambda state: monkeypatch.setattr(plans, "triton_interpreted", lambda: state)


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32, T: int = 5, B: int = 2, **options: Any) -> Problem:
    return Problem(device, dtype, T, B, **{"hidden_size": 4, **options})


def on_gpu(**options: Any) -> Problem:
    """A call that a table of the GPU may know: fp16, T=100, B=16, I=H=512, one layer."""
    gpu = {"index": 0, "input_size": 512, "tf32": True, "dropout": False, "kernels_only": False}
    gpu |= {k: options.pop(k) for k in list(options) if k in gpu}
    return problem("cuda", **{"dtype": torch.float16, "T": 100, "B": 16, "hidden_size": 512, **options}, gpu=OnGPU(**gpu))


@pytest.fixture
def measured(triton: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what was measured on the GPU: rows of a Timing."""
    launch = pytest.importorskip("fused_lstm.launch")
    triton(False)

    def use(*rows: tuple, kernels: str | None = None) -> None:
        table = launch.Table("made-up.json", {}, tuple(launch.Timing(*row) for row in rows), kernels or launch.kernels())
        monkeypatch.setattr(launch, "timed", lambda index: table if rows else None)

    return use


CUDNN_FASTER = ("float16", False, False, 128, 16, 512, 512, 1, 1, 0, 200.0, 100.0)
CUDNN_SLOWER = ("float16", False, False, 4096, 16, 512, 512, 1, 1, 0, 100.0, 300.0)


def test_auto_takes_torch_where_it_was_measured_faster(measured: Callable) -> None:
    measured(CUDNN_FASTER, CUDNN_SLOWER)
    plan = choose(on_gpu())
    assert (plan.backend, plan.how) == ("aten", "fused")
    assert "0.50x as fast as torch's own at the nearest size measured, T=128 B=16" in plan.rejected["triton"]
    plan = choose(on_gpu(T=2000))
    assert plan.backend == "triton"
    assert "3.00x as fast as torch's own" in plan.reason
    assert choose(on_gpu(), "triton").backend == "triton"
    assert choose(on_gpu(T=2000), "aten").backend == "aten"


@pytest.mark.parametrize(
    "options",
    [
        {"resets": True},
        {"packed": True},
        {"transformed": True},
        {"needs_grad": True, "recompute": True},
        {"dropout": True},
        {"kernels_only": True},
        {"needs_grad": True},  # the rest: nothing like it was measured
        {"lengths": True},
        {"dtype": torch.bfloat16},
        {"B": 15},
        {"input_size": 500},
        {"num_layers": 2},
        {"bidirectional": True},
        {"hidden_size": 128},
        {"proj_size": 2},
    ],
)
def test_auto_keeps_the_kernels(options: dict[str, Any], measured: Callable) -> None:
    measured(CUDNN_FASTER)
    assert choose(on_gpu(**options)).backend == "triton"


def test_auto_keeps_the_kernels_where_their_time_is_unknown(measured: Callable) -> None:
    measured()
    assert "not measured against torch's own" in choose(on_gpu()).reason
    measured(CUDNN_FASTER, kernels="older")
    plan = choose(on_gpu())
    assert plan.backend == "triton"
    assert "the kernels have changed since made-up.json was measured" in plan.reason
    assert plans.choose_compiled("cuda", torch.float16, False, False, False, "auto")[0] == "triton"


def test_fp32_is_asked_for_as_torch_computes_it(measured: Callable) -> None:
    measured(("tf32", *CUDNN_FASTER[1:]))
    assert choose(on_gpu(dtype=torch.float32)).backend == "aten"
    assert choose(on_gpu(dtype=torch.float32, tf32=False)).backend == "triton"


def test_the_shipped_table_is_that_of_the_committed_results(measured: Callable) -> None:
    """Its kernels are no longer these; were they, cuDNN would be taken exactly where it was faster."""
    launch = pytest.importorskip("fused_lstm.launch")
    data = json.loads((Path(__file__).parents[1] / "bench/results/nvidia-h100-80gb-hbm3.json").read_text())
    (table,) = (t for t in launch.tables.__wrapped__(data["about"]["device"]) if "configs" in t.source)
    assert table.kernels != launch.kernels()
    names = {"bf16": "bfloat16", "fp16": "float16"}
    times: dict[tuple, dict[str, float]] = {}
    for r in data["records"]:
        if r["variant"] == "plain" and r["provider"] in ("fused", "torch") and "us" in r:
            size = (r["T"], r["B"], r["I"], r["H"], r["layers"], 1 + r["bidirectional"], r["proj"])
            key = (names.get(r["dtype"], r["dtype"]), r["mode"] == "training", False, *size)
            times.setdefault(key, {})[r["provider"]] = round(r["us"][1], 1)
    expected = {k: (t["fused"], t["torch"]) for k, t in times.items() if len(t) == 2}
    assert {t[:10]: t[10:] for t in table.timings} == expected
    measured(*table.timings)
    for dtype, training, _, T, B, I, H, layers, directions, P in expected:  # noqa: E741
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        size = {"T": T, "B": B, "input_size": I, "hidden_size": H, "num_layers": layers, "proj_size": P}
        plan = choose(on_gpu(dtype=kind, needs_grad=training, bidirectional=directions == 2, **size))
        kernels_us, torch_us = expected[dtype, training, False, T, B, I, H, layers, directions, P]
        assert (plan.backend == "aten") == (torch_us < kernels_us)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"T": 1}, {"packed": True}, {"needs_grad": True, "proj_size": 2}])
def test_cuda_takes_triton(dtype: torch.dtype, options: dict, triton: Callable) -> None:
    triton(False)
    plan = choose(problem("cuda", dtype, **options))
    assert (plan.backend, plan.how, plan.rejected) == ("triton", "triton", {})


def test_fp64_on_a_triton_that_cannot_compile_it(triton: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    triton(False)
    monkeypatch.setattr(plans, "fp64_compiles", lambda: False)
    plan = choose(problem("cuda", torch.float64))
    assert plan.backend == "aten"
    assert "Triton 3.9" in plan.rejected["triton"]
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve this call: fp64 needs Triton 3.9"):
        choose(problem("cuda", torch.float64), "triton")


@pytest.mark.parametrize(
    ("state", "reason"), [(None, "Triton is not installed"), (True, "interpreter takes CPU tensors only")]
)
@pytest.mark.parametrize("T", [1, 5])
def test_cuda_without_triton(state: bool | None, reason: str, T: int, triton: Callable) -> None:
    triton(state)
    plan = choose(problem("cuda", T=T))
    assert (plan.backend, plan.how) == ("aten", "fused"), "the CPU's rules for T = 1 are not CUDA's"
    assert reason in plan.rejected["triton"]
    assert choose(problem("cuda", torch.float16)).how == "fused"
    assert choose(problem("cuda", torch.float64, needs_grad=True)).backend == "aten"
    error, message = failure(lambda: choose(problem("cuda", T=T), "triton"))
    assert error is RuntimeError
    assert message.startswith("backend='triton' cannot serve this call: ")
    assert reason in message


@pytest.mark.parametrize("state", [None, False, True])
@pytest.mark.parametrize(
    ("options", "backend", "how"),
    [
        ({}, "aten", "fused"),
        ({"needs_grad": True}, "aten", "fused"),
        ({"packed": True}, "aten", "fused"),
        ({"dtype": torch.float16}, "aten", "fused fp32"),
        ({"dtype": torch.float16, "packed": True, "T": 1}, "aten", "fused fp32"),
        ({"dtype": torch.float64}, "aten", "fused"),
        ({"dtype": torch.float64, "needs_grad": True}, "reference", "reference"),
        ({"dtype": torch.float64, "needs_grad": True, "packed": True}, "aten", "fused"),
        ({"dtype": torch.float64, "needs_grad": True, "T": 1}, "aten", "cell"),
        ({"T": 1}, "aten", "cell"),
        ({"T": 1, "needs_grad": True, "proj_size": 2}, "aten", "cell"),
        ({"T": 1, "packed": True}, "aten", "fused"),
        ({"T": 127, "packed": True}, "aten", "fused"),
        ({"T": 128, "packed": True}, "aten", "ragged"),
        ({"T": 128, "packed": True, "same_length": True}, "aten", "fused"),
        ({"T": 256, "packed": True, "same_length": True, "proj_size": 2, "needs_grad": True}, "aten", "ragged"),
        ({"T": 255, "packed": True, "proj_size": 2, "needs_grad": True}, "aten", "fused"),
        ({"T": 999, "packed": True, "dtype": torch.float64}, "aten", "fused"),
        ({"T": 31, "packed": True, "needs_grad": True}, "aten", "fused"),
        ({"T": 32, "packed": True, "needs_grad": True}, "aten", "ragged"),
        ({"T": 1, "dtype": torch.float16}, "aten", "cell fp32"),
        ({"T": 1, "B": 16}, "aten", "cell"),
        ({"T": 1, "B": 17}, "aten", "fused"),
        ({"T": 1, "B": 64, "hidden_size": 512}, "aten", "cell"),
        ({"T": 1, "B": 65, "hidden_size": 512}, "aten", "fused"),
        ({"T": 1, "B": 0}, "aten", "cell"),
    ],
)
def test_cpu(options: dict, backend: str, how: str, state: bool | None, triton: Callable) -> None:
    triton(state)
    plan = choose(problem(**options))
    assert (plan.backend, plan.how) == (backend, how)
    assert plan.rejected["triton"]


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize(
    ("options", "how", "without"),
    [
        ({}, "fused", "fused fp32"),
        ({"packed": True}, "fused", "fused fp32"),
        ({"T": 1}, "fused", "fused"),
        ({"lengths": True}, "ragged", "ragged fp32"),
        ({"recompute": True, "needs_grad": True}, "segments", "segments fp32"),
        ({"device": "cuda"}, "fused", "fused"),
    ],
)
def test_bf16(
    options: dict, how: str, without: str, avx512: bool, triton: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN computes it on a CPU with AVX-512; without, torch's LSTM is a slow loop."""
    triton(None)
    monkeypatch.setattr(plans, "onednn_has_bf16", lambda: avx512)
    plan = choose(problem(**{"dtype": torch.bfloat16, **options}))
    assert plan.how == (how if avx512 else without)
    assert ("computed in fp32" in plan.reason) == ("fp32" in plan.how)


@pytest.mark.parametrize(
    ("options", "backend", "how", "reason"),
    [
        ({}, "auto", "segments", "gates recomputed in the backward pass, in segments of 7 steps"),
        ({"packed": True}, "auto", "segments", "in segments of 7 steps"),
        ({"lengths": True, "resets": True, "T": 2}, "aten", "segments", "in segments of 1 step"),
        ({"dtype": torch.float16}, "auto", "segments fp32", "in segments of 7 steps, computed in fp32"),
        ({"dtype": torch.float64}, "auto", "segments", "in segments of 7 steps"),
        ({"device": "cuda"}, "aten", "segments", "in segments of 7 steps"),
        ({"device": "cuda"}, "auto", "triton", "gates recomputed in the backward pass"),
        ({"device": "cuda"}, "triton", "triton", "fused kernels, gates recomputed in the backward pass"),
        ({}, "reference", "reference", "the explicit backward pass, gates recomputed in the backward pass"),
        ({"T": 1}, "auto", "cell", "a cell per layer and direction"),
        ({"T": 1, "lengths": True}, "auto", "ragged", "control columns of torch's own fused LSTM"),
        ({"needs_grad": False}, "auto", "fused", "torch's own fused LSTM"),
        ({"needs_grad": False}, "reference", "reference", "plain PyTorch with the explicit backward pass"),
        ({"needs_grad": False, "device": "cuda"}, "triton", "triton", "fused kernels"),
    ],
)
def test_recompute(options: dict, backend: str, how: str, reason: str, triton: Callable) -> None:
    triton(False)
    plan = choose(problem(**{"T": 98, "needs_grad": True, "recompute": True, **options}), backend)
    assert plan.how == how
    assert reason in plan.reason
    plain = choose(problem(**{"T": 98, "needs_grad": True, **options}), backend)
    kept = options.get("needs_grad") is False or options.get("T") == 1
    assert (plan == plain) is kept, "where nothing can be recomputed, nothing changes"


def test_on_a_cpu_auto_runs_as_another_backend_does(triton: Callable) -> None:
    """So what tests show of that backend holds for it."""
    triton(False)
    taken, flags = set(), [(False, True)] * 7
    for dtype, T, B, proj, data in product(FLOATS, (1, 300), (2, 40), (0, 2), ("", "packed", "lengths", "resets")):
        for needs_grad, recompute, same, transformed, ensemble, forward, bidirectional in product(*flags):
            p = problem(dtype=dtype, T=T, B=B, proj_size=proj, bidirectional=bidirectional, needs_grad=needs_grad)
            p = p._replace(recompute=recompute, transformed=transformed, ensemble=ensemble, forward_mode=forward)
            if data:
                p = p._replace(**{data: True}, **{"stretches": 2} if data == "resets" else {"same_length": same})
            plan, *others = (choose(p, backend) for backend in ("auto", "aten", "reference"))
            taken.add(plan.way)
            assert (plan.way, plan.how) in [(other.way, other.how) for other in others], p
    assert taken == {*Way} - {Way.TRITON}
    for dtype, projected, transformed, differentiated in product(FLOATS, *flags[:3]):
        auto, aten, reference = (
            plans.choose_compiled("cpu", dtype, projected, transformed, differentiated, backend)
            for backend in ("auto", "aten", "reference")
        )
        assert auto == aten
        assert aten == reference or (aten[0] == "onednn" and not (projected or transformed or differentiated))


def test_an_old_triton(triton: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    triton(False)
    for version, old in (("3.4.0", True), ("3.5.0", False), ("3.10.1+git", False), ("4.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda _, version=version: version)
        plans.triton_too_old.cache_clear()
        plan = choose(problem("cuda"))
        assert (plan.backend == "aten") is old
        assert old is (plan.rejected.get("triton") == f"the kernels need Triton 3.5 or newer, found {version}")
    plans.triton_too_old.cache_clear()


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices(device: str, triton: Callable) -> None:
    triton(False)
    plan = choose(problem(device, T=1))
    assert (plan.backend, plan.how) == ("aten", "fused")
    assert repr(device) in plan.rejected["triton"]


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_asked_for(dtype: torch.dtype, backend: str) -> None:
    for options in ({}, {"T": 1}, {"needs_grad": True}, {"device": "cuda"}):
        plan = choose(problem(dtype=dtype, **options), backend)
        assert plan.backend == backend
        assert plan.reason.startswith("asked for; ")
        assert plan.rejected == {}


@pytest.mark.parametrize("backend", ["auto", "triton", "aten", "reference"])
@pytest.mark.parametrize("dtype", UNSUPPORTED)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_unsupported_dtypes(device: str, dtype: torch.dtype, backend: str, triton: Callable) -> None:
    triton(device == "cpu")
    error, message = failure(lambda: choose(problem(device, dtype), backend))
    assert error is RuntimeError
    assert "no backend can serve" in message if backend == "auto" else repr(backend) in message
    assert message.endswith(f"not {dtype}")


def test_triton_on_the_cpu(triton: Callable) -> None:
    triton(False)
    layer = fused_lstm.LSTM(3, 4, backend="triton")
    expected = (
        RuntimeError,
        "backend='triton' cannot serve this call: the kernels need a GPU and the input is on the CPU; only in Triton's "
        "interpreter (TRITON_INTERPRET=1 set before the first call, for tests) do they take CPU tensors",
    )
    assert failure(lambda: layer(X)) == expected
    assert failure(lambda: fused_lstm.explain(layer, X)) == expected
    triton(None)
    assert "Triton is not installed (pip install triton)" in failure(lambda: layer(X))[1]
    triton(True)
    assert fused_lstm.explain(layer, X).backend == "triton"


def test_unknown_backend() -> None:
    message = "backend should be one of 'auto', 'triton', 'aten', 'reference', got: 'cudnn'"
    assert failure(lambda: choose(problem(), "cudnn")) == (ValueError, message)


def test_a_plan_reads_well(triton: Callable) -> None:
    triton(None)
    assert str(choose(problem(T=1))) == (
        "backend: aten (cell)\n"
        "because: T = 1: a cell per layer and direction, since torch's LSTM reorders its weights on every call\n"
        "not triton: Triton is not installed (pip install triton)"
    )
    assert str(Plan("triton", Way.TRITON, "a reason")) == "backend: triton (triton)\nbecause: a reason"


# --- explain


def layer_for(**options: Any) -> fused_lstm.LSTM:
    return fused_lstm.LSTM(3, 4, 2, bidirectional=True, **options)


@pytest.mark.parametrize(
    ("options", "x", "expected"),
    [
        ({}, X, ("aten", "fused")),
        ({}, X[:1], ("aten", "cell")),
        ({"batch_first": True}, X.transpose(0, 1), ("aten", "fused")),
        ({"batch_first": True}, X[:, :1], ("aten", "cell")),
        ({}, X[:, 0], ("aten", "fused")),
        ({"batch_first": True}, X[:1, 0], ("aten", "cell")),
        ({}, X[:1].expand(1, 2, 3)[:, [0] * 17], ("aten", "fused")),
        ({"dtype": torch.float16}, X.half(), ("aten", "fused fp32")),
        ({"dtype": torch.float64}, X.double(), ("reference", "reference")),
        ({}, pack_sequence([X[:1, 0], X[:1, 1]]), ("aten", "fused")),
        ({"dtype": torch.float64}, pack_sequence([X[:, 0].double(), X[:2, 1].double()]), ("aten", "fused")),
        ({"backend": "reference"}, X, ("reference", "reference")),
        ({"backend": "aten"}, X[:1], ("aten", "cell")),
        ({"recompute": True}, X, ("aten", "segments")),
        ({"recompute": True, "dtype": torch.float16}, X.half(), ("aten", "segments fp32")),
        ({"recompute": True, "dtype": torch.float64}, X.double(), ("aten", "segments")),
        ({"recompute": True, "backend": "reference"}, X, ("reference", "reference")),
    ],
)
def test_explain(options: dict, x: Any, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan says what the call then does."""
    ran = []
    for way, runner in functional.RUNNERS.items():
        monkeypatch.setitem(functional.RUNNERS, way, lambda *a, way=way, runner=runner: ran.append(way) or runner(*a))
    by_op = functional.run_layers
    monkeypatch.setattr(functional, "run_layers", lambda *a: ran.append(Way(a[5])) or by_op(*a))
    layer = layer_for(**options)
    plan = fused_lstm.explain(layer, x)
    assert (plan.backend, plan.how) == expected
    assert plan.reason
    assert ran == []
    layer(x)
    assert ran == [plan.way]
    if "dtype" in options:
        hx = states(4, 2, 4, dtype=options["dtype"])
        assert fused_lstm.explain(layer, x, hx) == plan


def test_explain_knows_whether_a_gradient_is_needed() -> None:
    layer = layer_for(dtype=torch.float64)
    x, hx = X.double(), states(4, 2, 4)
    assert fused_lstm.explain(layer, x).backend == "reference"
    with torch.no_grad():
        assert fused_lstm.explain(layer, x).backend == "aten"
    layer.requires_grad_(False)
    assert fused_lstm.explain(layer, x, hx).backend == "aten"
    for tensor in (x, *hx):
        tensor.requires_grad_(True)
        assert fused_lstm.explain(layer, x, hx).backend == "reference"
        tensor.requires_grad_(False)


def test_explain_knows_autocast() -> None:
    """Under autocast the call runs in its dtype, and so does what explain thinks of."""
    layer = layer_for()
    with torch.autocast("cpu", torch.bfloat16):
        assert flat(layer(X))[0].dtype == torch.bfloat16
        assert layer.problem(X).dtype == torch.bfloat16
        assert fused_lstm.explain(layer, X).how == ("fused" if plans.onednn_has_bf16() else "fused fp32")
        assert fused_lstm.explain(layer, X[:1]).how == "fused"


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
@pytest.mark.parametrize("given", [{}, {"lengths": [2, 5]}])
def test_bf16_without_avx512_is_fp32_rounded(given: dict, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "onednn_has_bf16", lambda: False)
    layer, x = layer_for(dtype=torch.bfloat16, **options), X.bfloat16()
    plan = fused_lstm.explain(layer, x, **given)
    assert "computed in fp32" in plan.reason
    rounded = [*flat(layer(x, **given)), *torch.autograd.grad(layer(x, **given)[0].sum(), list(layer.parameters()))]
    layer.float()
    y = layer(x.float(), **given)[0]
    wide = [*flat(layer(x.float(), **given)), *torch.autograd.grad(y.sum(), list(layer.parameters()))]
    assert all_equal(rounded, [t.bfloat16() for t in wide])


def test_the_problem_of_a_call() -> None:
    layer = fused_lstm.LSTM(3, 4, 2, bidirectional=True, proj_size=2, batch_first=True)
    assert layer.problem(randn(7, 5, 3).float()) == Problem(
        "cpu", torch.float32, T=5, B=7, hidden_size=4, proj_size=2, num_layers=2, bidirectional=True, needs_grad=True
    )
    packed = pack_sequence([randn(n, 3).float() for n in (4, 2, 1)])
    assert layer.requires_grad_(False).problem(packed) == Problem(
        "cpu", torch.float32, T=4, B=3, hidden_size=4, proj_size=2, num_layers=2, bidirectional=True, packed=True
    )


def test_explain_raises_what_the_call_raises() -> None:
    layer = fused_lstm.LSTM(3, 4)
    for x, hx in ((X[..., :2], None), (X.double(), None), (X[:0], None), (X[0, 0], None), (X, states(2, 2, 4))):
        assert failure(lambda x=x, hx=hx: fused_lstm.explain(layer, x, hx)) == failure(lambda x=x, hx=hx: layer(x, hx))
