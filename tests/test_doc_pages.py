"""The pages of docs/: their code runs, their commands exist, and the error messages they explain are those raised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_errors import LSTM, PACKED, H, X
from torch import nn

import fused_lstm
from fused_lstm import ops, plan, tune
from fused_lstm.call import LayerCall, Problem
from fused_lstm.launch.choice import read_table
from fused_lstm.launch.schedule import Device, Recurrence

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RUN_HERE = (
    "quickstart.md", "from_nn_lstm.md", "sequences.md", "inspect.md", "regularization.md", "cells.md", "transforms.md",
    "kernels.md", "performance.md", "troubleshooting.md",
)  # fmt: skip
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
QUOTE = re.compile(r"# (\S+\.py)\n")  # the first line of a block that quotes a file


def blocks(page: str, kind: str) -> list[tuple[int, str]]:
    """The fenced blocks of a kind on a page: the line on which each begins, and its text."""
    text = (DOCS / page).read_text()
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in FENCE.finditer(text) if m[1] == kind]


@pytest.mark.parametrize("page", RUN_HERE)
def test_code_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    """As a file, in which each line has the number that it has on the page."""
    lines = ["import torch; torch.set_num_threads(1)"]
    code = [(first, text) for first, text in blocks(page, "python") if not QUOTE.match(text)]
    assert code
    for first, text in code:
        lines += [""] * (first - 1 - len(lines)) + text.splitlines()
    script = tmp_path / f"{page}.py"
    script.write_text("\n".join(lines) + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    run = subprocess.run([sys.executable, str(script)], env=environment, **options)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("page", RUN_HERE)
def test_quoted_lines_exist(page: str) -> None:
    for first, text in blocks(page, "python"):
        quote = QUOTE.match(text)
        if quote:
            lines = {line.strip() for line in (ROOT / quote[1]).read_text().splitlines()}
            for line in text.splitlines()[1:]:
                assert line in lines, f"{page}, line {first}: {quote[1]} has no line {line}"


def test_no_page_is_forgotten() -> None:
    """Each page with Python is run here, or named by the test that runs it."""
    others = [path.read_text() for path in ROOT.glob("tests/test_*.py") if path.name != Path(__file__).name]
    for path in DOCS.glob("*.md"):
        kinds = [m[1] for m in FENCE.finditer(path.read_text())]
        odd = {kind for kind in kinds if kind.strip().lower().startswith("py") and kind != "python"}
        assert not odd, f"{path.name}: expected fences of ```python, which tests look for, got {odd}"
        if "python" in kinds and path.name not in RUN_HERE:
            assert any(f'"{path.name}"' in text for text in others), f"{path.name} is run by no test: add it to RUN_HERE"


def test_contents_list_every_page() -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text())
    assert len(listed) == len(set(listed))
    assert set(RUN_HERE) | {"compare.md", "math.md", "export.md"} <= set(listed)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_within_pages_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", (DOCS / page).read_text()):
        path = DOCS / (target or page)
        if "://" not in target and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{page}: {target}#{anchor}"


def anchors(text: str) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", RUN_HERE)
def test_commands_exist(page: str) -> None:
    """Scripts and modules that are started with options which they know."""
    for _, text in blocks(page, ""):
        for line in text.splitlines():
            command = line.split("#")[0].split()
            if command[:1] != ["python"]:
                continue
            script = ROOT / (command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1])
            assert script.is_file(), line
            source = script.read_text() + (ROOT / "bench/run.py").read_text() * (script.name == "compare.py")
            for option in filter(lambda word: word.startswith("--"), command):
                assert f'"{option}"' in source, f"{script.name} knows no {option}"


def test_no_measured_number_is_typed() -> None:
    """They come from files of results, to which the page links."""
    text = re.sub(FENCE, "", (DOCS / "performance.md").read_text())
    assert not re.findall(r"\d[\d.,]*\s*(?:x\b|%|times|us\b|ms\b|s\b|seconds|minutes|[KMG]i?B|T?FLOP)", text)


@pytest.mark.parametrize("name", ["schedule-stepwise.svg", "schedule-persistent.svg"])
def test_drawings_serve_both_themes(name: str) -> None:
    text = (DOCS / name).read_text()
    root = ET.fromstring(text)
    assert root.find("{*}title") is not None
    assert root.find("{*}desc") is not None
    light, dark = root.find("{*}style").text.split("@media (prefers-color-scheme: dark)")
    used = {c for element in root.iter() for c in element.get("class", "").split()} - {"bold"}  # which has no colour
    for theme in (light, dark):
        defined = set(re.findall(r"\.(\w+) \{[^}]*(?:fill|stroke): #", theme))
        assert used <= defined, f"{name}: no colour for {used - defined}"


# --- the messages that docs/troubleshooting.md explains


def call(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: LSTM(*args, **kwargs)


def asked(backend: str, device: str = "cuda", dtype: torch.dtype = torch.float32, **facts: Any) -> Callable[[], Any]:
    """A choice of backend, with what the plan finds out about the machine given: the machine of the test may differ."""

    def choose_so() -> None:
        with pytest.MonkeyPatch.context() as patch:
            known = {"triton_interpreted": False, "triton_too_old": None, "fp64_compiles": True} | facts
            resets = known.pop("resets", False)
            for name, value in known.items():
                patch.setattr(plan, name, lambda value=value: value)
            plan.choose(Problem(device, dtype, T=4, B=3, hidden_size=3, resets=resets), backend)

    return choose_so


def bidirectional_step() -> None:
    fused_lstm.LSTM(2, 3, bidirectional=True).step(X[0])


def step_under_autocast() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        LSTM.step(X[0], (H.clone(), H.clone()), inplace=True)


def not_saved() -> None:
    x = X.clone().requires_grad_()
    given = LayerCall(
        x, H, H, torch.zeros(12, 2), torch.zeros(12, 3), *[None] * 8,
        directions=1, batch_first=False, save=False, engine="reference", recompute=False,
    )  # fmt: skip
    ops.layer_forward(*given)[0].sum().backward()


def a_broken_table(folder: Path) -> None:
    (folder / "table.json").write_text("{}")
    read_table(folder / "table.json")


def nothing_runs(_: Path) -> None:
    class Trial(tune.Trial):
        def run(self, config: Any) -> torch.Tensor:
            self.runs = getattr(self, "runs", 0) + 1
            if self.runs > 1:
                raise RuntimeError("out of resources")
            return torch.ones(1)  # the reference

    problem = Recurrence("forward", "fp32", T=2, H=16, B=1, R=1)
    tune.tune(Trial(problem, torch.float32, torch.device("cpu")), Device("small", 1), 1)


def onnx_of_resets() -> None:
    import fused_lstm.onnx as onnx

    given = dict.fromkeys(LayerCall._fields[:13]) | {"w_ih": torch.zeros(12, 2), "w_hh": torch.zeros(12, 3), "resets": X}
    onnx.layer(**given, directions=1, batch_first=False, save=False, engine="onednn", recompute=False, cell="")


# A call for each message; those that write files take a folder.
RAISES: list[Callable[..., Any]] = [
    call(X, (H[:, :2], H)),
    call(X.double()),
    call(X, (H, H.double())),
    call(X[:0]),
    call(X, lengths=[1.0, 2.0, 3.0]),
    call(X, lengths=[1, 2]),
    call(X, lengths=[1, 2, 5]),
    call(X, resets=torch.zeros(3, 4)),
    asked("triton", "cpu"),
    asked("triton", triton_interpreted=True),
    asked("triton", dtype=torch.float64, fp64_compiles=False),
    asked("aten", resets=True),
    bidirectional_step,
    lambda: LSTM.step(X[0], (H.clone(), H.clone()), inplace=True),
    step_under_autocast,
    lambda: fused_lstm.LSTM.from_torch(nn.GRU(2, 3)),
    lambda: fused_lstm.LSTM.from_torch(nn.utils.parametrizations.weight_norm(nn.LSTM(2, 3), "weight_hh_l0")),
    lambda: fused_lstm.LSTM.from_torch(type("Own", (nn.LSTM,), {"forward": lambda self, x: x})(2, 3)),
    lambda: fused_lstm.lstm(X, (H, H), list(LSTM.parameters())[:3]),
    lambda: fused_lstm.inspect_gates(LSTM, PACKED),
    lambda: torch.func.grad(lambda x: fused_lstm.inspect_gates(LSTM, x).c.sum())(X),
    not_saved,
    onnx_of_resets,
    a_broken_table,
    nothing_runs,
]
FILES = (a_broken_table, nothing_runs)


def messages() -> list[str]:
    """The headings of the page that are error messages."""
    return re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def pattern(message: str) -> re.Pattern[str]:
    """A heading as a pattern: <...> stands for anything."""
    return re.compile(".+?".join(map(re.escape, re.split(r"<[^<>]*>", message))), re.DOTALL)


def test_every_message_of_the_page_is_raised(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    headings = messages()
    raised = []
    for trigger in RAISES:
        with pytest.raises(Exception) as error:  # noqa: PT011 -- its message is looked at below
            trigger(tmp_path) if trigger in FILES else trigger()
        text = str(error.value)
        raised.append(text)
        matching = [heading for heading in headings if pattern(heading).fullmatch(text)]
        assert len(matching) == 1, f"expected one heading of the page for the error {text!r}, got {matching}"
    unseen = [heading for heading in headings if not any(pattern(heading).fullmatch(text) for text in raised)]
    assert not unseen, f"no call of this test raises {unseen}"
