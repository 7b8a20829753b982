"""fused_lstm.onnx: the exported models in onnxruntime against the layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import call, dynamic_sizes, flat
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import fused_lstm

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
to_onnx = importlib.import_module("fused_lstm.onnx")

CASES = [
    ("", {}),
    ("hx", {"bidirectional": True, "bias": False}),
    ("hx", {"batch_first": True, "num_layers": 2}),
    ("lengths", {"bidirectional": True, "num_layers": 2}),
    ("hx lengths", {"batch_first": True}),
    ("", {"proj_size": 2, "num_layers": 2}),
    ("hx", {"proj_size": 2, "bidirectional": True}),
    ("hx lengths", {"proj_size": 2, "bidirectional": True, "batch_first": True, "num_layers": 2}),
    ("hx", {"dtype": torch.float16}),
]


def exported(lstm: fused_lstm.LSTM, extras: str = "", **options: Any) -> torch.onnx.ONNXProgram:
    sizes = dynamic_sizes(lstm, extras, "T", "B")
    return to_onnx.export(lstm, kwargs=call(lstm, extras, 7, 4), dynamic_shapes=sizes, verbose=False, **options)


def runner(model: bytes | str) -> Callable[..., list[Tensor]]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*arguments: Any) -> list[Tensor]:
        values = [t.numpy() for t in tree_leaves(arguments)]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, values, strict=True)))]

    return run


def assert_same(program: torch.onnx.ONNXProgram, lstm: fused_lstm.LSTM, extras: str = "") -> None:
    run = runner(program.model_proto.SerializeToString())
    for T, B in ((7, 4), (1, 1), (13, 2), (2, 9)):
        arguments = call(lstm, extras, T, B)
        with torch.no_grad():
            expected = flat(lstm(**arguments))
        for ours, theirs in zip(run(*arguments.values()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if ours.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(("extras", "options"), CASES)
def test_onnxruntime_computes_the_same_at_any_size(extras: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lstm = fused_lstm.LSTM(3, 5, **options).eval()
    program = exported(lstm, extras)
    assert [node.op_type for node in program.model_proto.graph.node].count("LSTM") == lstm.num_layers
    assert_same(program, lstm, extras)


def test_a_row_without_steps_keeps_its_state() -> None:
    """onnxruntime's own operator says zero there."""
    lstm = fused_lstm.LSTM(3, 5).eval()
    arguments = call(lstm, "hx lengths", 4, 2) | {"lengths": torch.tensor([0, 4])}
    run = runner(exported(lstm, "hx lengths").model_proto.SerializeToString())
    y, h_n, c_n = run(*arguments.values())
    h0, c0 = arguments["hx"]
    assert torch.equal(h_n[:, 0], h0[:, 0])
    assert torch.equal(c_n[:, 0], c0[:, 0])
    assert not y[:, 0].any()


def test_whatever_padding_holds_does_not_matter() -> None:
    lstm = fused_lstm.LSTM(3, 5, bidirectional=True).eval()
    run = runner(exported(lstm, "lengths").model_proto.SerializeToString())
    x, lengths = torch.randn(4, 2, 3), torch.tensor([4, 2])
    clean = run(x, lengths)
    x[2:, 1] = float("nan")
    for before, after in zip(clean, run(x, lengths), strict=True):
        assert torch.equal(before, after)


def test_a_model_is_written_to_a_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), fused_lstm.LSTM(3, 5)).eval()
    x = torch.randn(7, 2, 4)
    to_onnx.export(model, (x,), tmp_path / "model.onnx", verbose=False, input_names=["sound"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    y = session.run(None, {"sound": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), model(x)[0].detach(), rtol=0, atol=1e-5)


def test_the_table_serves_torch_itself_and_an_exported_program() -> None:
    lstm = fused_lstm.LSTM(3, 5, num_layers=2).eval()
    dims = dynamic_sizes(lstm, "", torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC)
    options = {"dynamo": True, "custom_translation_table": to_onnx.translation_table(), "verbose": False}
    arguments = call(lstm, "", 7, 4)
    # Both with what a backward pass would need, which no one reads.
    assert_same(torch.onnx.export(lstm, kwargs=arguments, dynamic_shapes=dims, **options), lstm)
    assert_same(to_onnx.export(torch.export.export(lstm, (), arguments, dynamic_shapes=dims), verbose=False), lstm)


def test_translations_of_other_ops_are_added_and_may_replace_ours() -> None:
    lstm, ours = fused_lstm.LSTM(3, 5).eval(), torch.ops.fused_lstm.layer_forward.default

    def doubled(*args: Any, **kwargs: Any) -> tuple:
        y, *rest = to_onnx.layer(*args, **kwargs)
        return to_onnx.op.Add(y, y), *rest

    run = runner(exported(lstm, custom_translation_table={ours: doubled}).model_proto.SerializeToString())
    arguments = call(lstm, "", 3, 2)
    torch.testing.assert_close(run(*arguments.values())[0], 2 * lstm(**arguments)[0].detach(), rtol=0, atol=1e-5)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fused_lstm.LSTM(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(PackedSequence(x, torch.tensor([2, 2, 1])))[0].data


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.w_hh = fused_lstm.LSTM(3, 5), nn.Parameter(torch.randn(2, 20, 5))

    def forward(self, x: Tensor) -> Tensor:
        shared = dict(self.lstm.named_parameters())
        return torch.vmap(lambda w: torch.func.functional_call(self.lstm, shared | {"weight_hh_l0": w}, x)[0])(self.w_hh)


def test_what_onnx_cannot_express_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="resets cannot be exported: ONNX's LSTM has no means to clear its state"):
        exported(fused_lstm.LSTM(3, 5).eval(), "resets")
    with pytest.raises(NotImplementedError, match=r"packed sequences cannot be exported.*lengths= instead"):
        to_onnx.export(Packed().eval(), (torch.randn(5, 3),), verbose=False)
    with pytest.raises(NotImplementedError, match="vmap over a layer's weights, cannot be exported"):
        to_onnx.export(Ensemble().eval(), (torch.randn(4, 2, 3),), verbose=False)


def test_errors_of_torch_stay_its_own() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x)

    with pytest.raises(torch.onnx.OnnxExporterError, match="eig"):
        to_onnx.export(Unknown().eval(), (torch.randn(3, 3),), verbose=False)
