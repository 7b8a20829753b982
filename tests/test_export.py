"""torch.export and AOTInductor: one node per layer, which takes other T and B than those it was exported with. torch.fx and
torch.jit.trace."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import assert_all_close, call, dynamic_sizes, flat
from torch.export import Dim, ExportedProgram

import fused_lstm

CASES = [
    ("", {}),
    ("hx", {"bidirectional": True, "bias": False}),
    ("lengths", {"batch_first": True, "bidirectional": True, "num_layers": 2}),
    ("resets", {"bidirectional": True}),
    ("lengths resets", {"batch_first": True}),
    ("hx", {"proj_size": 2, "num_layers": 2}),
    ("hx lengths", {"proj_size": 2, "bidirectional": True}),
    ("hx resets", {"dtype": torch.float64, "num_layers": 2}),  # not by oneDNN
]
SIZES = [(7, 4), (1, 1), (13, 2), (2, 9)]  # the first is the example's


def exported(lstm: fused_lstm.LSTM, extras: str = "", strict: bool = False) -> ExportedProgram:
    sizes = dynamic_sizes(lstm, extras, Dim("T", min=1, max=99), Dim("B", min=1, max=99))
    return torch.export.export(lstm, (), call(lstm, extras, *SIZES[0]), dynamic_shapes=sizes, strict=strict)


def nodes(program: ExportedProgram) -> int:
    return sum(node.target is torch.ops.fused_lstm.layer_forward.default for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("extras", "options", "strict"), [*((*case, False) for case in CASES), *((*case, True) for case in CASES[1::2])]
)
def test_results_are_those_of_the_layer_at_any_size(extras: str, options: dict[str, Any], strict: bool) -> None:
    torch.manual_seed(0)
    lstm = fused_lstm.LSTM(3, 5, **options)
    program = exported(lstm, extras, strict)
    assert nodes(program) == lstm.num_layers
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for sizes in SIZES:
        arguments = call(lstm, extras, *sizes)
        expected = flat(lstm(**arguments))
        assert_all_close(flat(program.module()(**arguments)), expected)
        assert_all_close(flat(loaded.module()(**arguments)), expected)


def test_unbatched_input() -> None:
    lstm = fused_lstm.LSTM(3, 5)
    program = torch.export.export(lstm, (torch.randn(7, 3),), dynamic_shapes={"input": {0: Dim("T", min=1, max=99)}})
    x = torch.randn(4, 3)
    assert_all_close(flat(program.module()(x)), flat(lstm(x)))


def test_lengths_are_checked_when_the_program_runs() -> None:
    lstm = fused_lstm.LSTM(3, 5)
    arguments = call(lstm, "lengths", 3, 2) | {"lengths": torch.tensor([4, 1])}
    with pytest.raises(ValueError, match="lengths should be between 0 and T = 3, got 1 to 4"):
        exported(lstm, "lengths").module()(**arguments)


def test_an_exported_program_trains() -> None:
    lstm = fused_lstm.LSTM(3, 5, num_layers=2)
    module = exported(lstm).module()
    gradients = []
    for run, parameters in ((lstm, lstm.parameters()), (module, module.parameters())):
        y, h_n, c_n = flat(run(**call(lstm, "", 5, 3)))
        gradients.append(torch.autograd.grad(y.square().sum() + h_n.sum() + c_n.sum(), list(parameters)))
    assert_all_close(*gradients)


def test_exported_without_gradients_it_keeps_nothing_and_says_so() -> None:
    lstm = fused_lstm.LSTM(3, 5)
    with torch.no_grad():
        module = exported(lstm).module()
    y, _ = module(**call(lstm, "", 5, 3))
    with pytest.raises(RuntimeError, match="run with save=False"):
        y.sum().backward()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aotinductor_takes_any_size(tmp_path: Path) -> None:
    lstm = fused_lstm.LSTM(3, 5, num_layers=2, bidirectional=True)
    with torch.no_grad():
        file = torch._inductor.aoti_compile_and_package(exported(lstm, "lengths"), package_path=str(tmp_path / "lstm.pt2"))
        package = torch._inductor.aoti_load_package(file)
        for sizes in SIZES:
            arguments = call(lstm, "lengths", *sizes)
            assert_all_close(flat(package(**arguments)), flat(lstm(**arguments)))


def test_torch_fx_takes_the_layer_for_a_leaf() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), fused_lstm.LSTM(3, 4, 2, dropout=0.5))
    traced, x = torch.fx.symbolic_trace(model), torch.randn(5, 2, 3)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert not torch.equal(traced(x)[0], traced(x)[0])
    assert_all_close(flat(traced.eval()(x)), flat(model.eval()(x)))
    assert pickle.loads(pickle.dumps(model[1])).__class__ is fused_lstm.LSTM


@pytest.mark.parametrize("kind", ["lengths", "resets"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_decides_nothing_by_numbers(backend: str, kind: str) -> None:
    layer, x = fused_lstm.LSTM(3, 4, bidirectional=True, backend=backend).requires_grad_(False), torch.randn(5, 3, 3)
    given = {
        "lengths": [torch.tensor(lengths) for lengths in ([5, 5, 5], [2, 2, 2], [1, 5, 0])],
        "resets": [x[..., 0] > 9, x[..., 0] > 0, x[..., 0] < 0],
    }[kind]

    class Call(torch.nn.Module):
        def forward(self, x: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(flat(layer(x, **{kind: value})))

    for example in given:
        traced = torch.jit.trace(Call(), (x, example), check_trace=False)
        for value in given:
            assert_all_close(traced(x, value), flat(layer(x, **{kind: value})))


def test_onnx_is_not_imported_unasked() -> None:
    found = "{m.split('.')[0] for m in sys.modules} & {'onnx', 'onnxscript', 'onnxruntime'}"
    done = subprocess.run([sys.executable, "-c", f"import sys, fused_lstm; sys.exit(bool({found}))"], timeout=120)
    assert done.returncode == 0


def test_without_onnxscript_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "fused_lstm.onnx", raising=False)
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript"):
        importlib.import_module("fused_lstm.onnx")
