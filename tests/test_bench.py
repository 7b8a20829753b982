"""The benchmarks: what they refuse, what they keep, what they flag, and that the report says what the records say."""

from __future__ import annotations

import copy
import json
import math
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cases
import compare
import measure
import providers
import pytest
import report
import run
import torch
from cases import SUITES, WORKLOADS, Case, suite
from process import isolated
from torch import Tensor, nn

BENCH = Path(__file__).resolve().parents[1] / "bench"
TINY = Case("tiny", 3, 5, 4, 6, "fp32")
RAGGED = [TINY, *(replace(TINY, variant=v) for v in ("lengths", "packed", "resets"))]


def measured(case: Case, names: list[str], mode: str = "training", seconds: float = 0.0) -> dict[str, dict[str, Any]]:
    arguments = dict(device="cpu", seconds=seconds, seed=0, threads=torch.get_num_threads())
    return {r["provider"]: r for r in measure.measure(asdict(case), [mode], names, **arguments)}


# --- measuring


@pytest.mark.parametrize("case", RAGGED, ids=lambda c: c.variant)
@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
def test_everybody_takes_turns(case: Case, mode: str) -> None:
    names = ["torch", "fused", "fused-aten", "fused-reference", "fused-recompute", "torch-plain", "fused-plain"]
    if case.variant == "resets":
        names.append("torch-by-hand")
    rows = measured(case, names, mode)
    assert list(rows) == names
    for row in rows.values():
        assert "refused" not in row
        assert len(row["rounds_us"]) >= measure.FEWEST_ROUNDS
        assert min(row["rounds_us"]) > 0
        names_of_gradients = {"dx", *("d" + n for n, _ in nn.LSTM(1, 1).named_parameters())}
        wanted = {"output", "h_n", "c_n"} | (names_of_gradients if mode == "training" else set())
        assert row["error"].keys() == wanted
        assert max(row["error"].values()) < 1e-5


@pytest.mark.parametrize("case", [replace(TINY, layers=2, bidirectional=True, proj=2), replace(TINY, B=40, dtype="bf16")])
def test_other_layers_are_checked_as_well(case: Case) -> None:
    rows = measured(case, ["torch", "fused", "fused-reference"])
    assert not any("refused" in row for row in rows.values())


def test_of_one_step_some_gradients_are_zero() -> None:
    """Those by W_hh, since the first state is."""
    rows = measured(replace(TINY, T=1), ["torch", "fused"])
    assert rows["fused"]["rounds_us"]
    assert rows["fused"]["error"]["dweight_hh_l0"] == 0
    json.dumps(list(rows.values()), allow_nan=False)


def test_masking_by_hand_has_no_cell_state() -> None:
    row = measured(replace(TINY, variant="lengths"), ["torch", "torch-by-hand"])["torch-by-hand"]
    assert row["rounds_us"]
    assert "c_n" not in row["error"]
    assert "output" in row["error"]


@pytest.mark.parametrize("what", ["output", "state", "row", "gradient", "padding"])
@pytest.mark.parametrize("name", ["fused", "fused-reference"])
def test_a_wrong_result_gets_no_time(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the last bits of fp32, or in one place only."""
    right = providers.PROVIDERS[name]

    def planted(layer: nn.LSTM, case: Case, ragged: providers.Ragged) -> providers.Runner:
        runner = right(layer, case, ragged)
        off = {"output": 0, "row": 0, "state": 2, "padding": 0}.get(what)

        def call(x: Tensor) -> list[Tensor]:
            results = list(runner.call(x))
            if what == "row":
                results[0] = results[0] * (torch.arange(40)[:, None] != 29)
            elif what == "padding":
                results[0] = results[0] + (torch.arange(5)[:, None, None] >= 4) * 1e-3
            else:
                results[off] = results[off] * (1 + 3e-6)
            return results

        if off is not None:
            return replace(runner, call=call)
        return replace(runner, gradients=lambda: {k: g * (1 + 3e-6) for k, g in runner.gradients().items()})

    monkeypatch.setitem(providers.PROVIDERS, name, planted)
    row = measured(replace(TINY, B=40, variant="lengths"), ["torch", name])[name]
    assert "rounds_us" not in row
    assert row["refused"].startswith("wrong result, not timed")


def test_who_cannot_run_says_why() -> None:
    names = ["torch", "fused-persistent", "haste", "flashrnn", "torchrl", "torch-compile"]
    both_ways = measured(replace(TINY, variant="resets", bidirectional=True), ["torch", "fused", "fused-plain"])
    assert "rounds_us" in both_ways["fused-plain"]
    assert both_ways["torch"]["refused"].startswith("cannot run: a loop over steps cannot go backwards in time")
    rows = measured(replace(TINY, variant="resets"), names)
    assert "rounds_us" in rows.pop("torch")
    for name, row in rows.items():
        assert row["refused"].startswith("cannot run: "), name
        assert "rounds_us" not in row
    if not torch.cuda.is_available():
        assert rows["fused-persistent"]["refused"] == "cannot run: needs a GPU"


def test_memory_of_a_training_step() -> None:
    """nn.LSTM keeps gates and states of every step; recomputing, we do not."""
    case = replace(TINY, B=16, T=64, I=32, H=64, suite="memory")
    rows = measured(case, ["torch", "fused", "fused-recompute"])
    output = 4 * 16 * 64 * 64
    assert rows["torch"]["retained_bytes"] > 5 * output
    assert rows["torch"]["peak_bytes"] > rows["torch"]["retained_bytes"]
    assert output <= rows["fused-recompute"]["retained_bytes"] < rows["torch"]["retained_bytes"] / 3


# --- peers


@pytest.mark.parametrize("variant", ["plain", "resets"])
@pytest.mark.parametrize(("name", "backend"), [("flashrnn", "vanilla"), ("torchrl", "pad")])
def test_adapters_of_peers(name: str, backend: str, variant: str) -> None:
    """By the backends of theirs that run on a CPU."""
    pytest.importorskip(name)
    if (name, variant) == ("flashrnn", "resets"):
        return
    data = measure.Data(replace(TINY, variant=variant, T=20), "cpu", 0)
    runner = getattr(providers, f"with_{name}")(data.layer, data.case, data.ragged, backend=backend)
    assert max(measure.errors(data.results(runner, "training"), data.exact(data.ragged, "training")).values()) < 1e-5


def test_adapter_of_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for its layer, which needs a GPU: its weights are (I, 4H) and (H, 4H), its gates i, g, f, o."""

    class LSTM(nn.Module):
        def __init__(self, input_size: int, hidden_size: int) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.empty(input_size, 4 * hidden_size))
            self.recurrent_kernel = nn.Parameter(torch.empty(hidden_size, 4 * hidden_size))
            self.bias = nn.Parameter(torch.empty(4 * hidden_size))

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            h = c = x.new_zeros(x.shape[1], self.recurrent_kernel.shape[0])
            outputs = []
            for step in x:
                i, g, f, o = (step @ self.kernel + h @ self.recurrent_kernel + self.bias).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            return torch.stack(outputs), None

    monkeypatch.setitem(sys.modules, "haste_pytorch", types.SimpleNamespace(LSTM=LSTM))
    row = measured(TINY, ["torch", "haste"])["haste"]
    assert max(row["error"].values()) < 1e-5
    assert row["rounds_us"]


# --- processes


def test_a_crash_or_a_hang_loses_one_result() -> None:
    crashed = isolated("os:abort", 60)
    assert crashed["failed"] == "exit status -6"
    hung = isolated("signal:pause", 1)
    assert hung["failed"] == "no end after 1 s"
    assert isolated("math:no_such_function", 60)["output"].strip().endswith("'no_such_function'")
    assert isolated("os:getpid", 60)["result"] != isolated("os:getpid", 60)["result"]
    rows = run.merged(TINY, ["training"], [crashed | {"providers": ["torch", "fused"]}], {})
    assert [r["refused"].split(":")[0] for r in rows] == ["failed", "failed"]
    assert all("us" not in r for r in rows)


def cli(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCH / "run.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_interrupted_results_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    file = tmp_path / "r.json"
    child = cli("--suite", "latency", "--providers", "fused", "--seconds", "0.01", "--device", "cpu", "--json", str(file),
                "--processes", "1", "--threads", "1")  # fmt: skip
    end = time.monotonic() + 120
    while not (file.exists() and '"ratio"' in file.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert f"what was measured is in {file}" in errors
    found = json.loads(file.read_text())
    assert not found["complete"]
    assert any("ratio" in r for r in found["records"])


def test_a_whole_run_and_its_report(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    file = tmp_path / "r.json"
    child = cli("--suite", "lengths", "memory", "--only", "B=16 T=128", "--quick", "--seconds", "0.01", "--device", "cpu",
                "--threads", "1", "--json", str(file))  # fmt: skip
    output, errors = child.communicate(timeout=250)
    assert child.returncode == 0, errors
    assert "lengths, `lengths=`, training: " in output
    found = json.loads(file.read_text())
    assert found["complete"]
    assert {"device", "torch", "commit", "date", "threads", "fused_lstm"} <= found["about"].keys()
    assert found["floors"]["flop_per_us"]["fp32"] > 1e3
    assert report.main([str(file)]) == 0
    page = (tmp_path / "README.md").read_text()
    ours = [r for r in found["records"] if r["provider"] == "fused"]
    assert len(ours) == 3 + 1, "three modes, and one for memory"
    for r in ours:
        assert r["x_of_floor"] == pytest.approx(r["us"][1] / r["floor_us"])
        if r["suite"] == "memory":
            assert f"| {r['peak_bytes'] / 2**20:.1f} MiB |" in page
        else:
            assert report.spread(r["ratio"]["torch"]) in page
    charts = [name for name in page.split('"') if name.endswith(".svg")]
    assert len(charts) == 2
    assert all((tmp_path / name).exists() for name in charts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "all", "--only", "nonesuch"], "has 'nonesuch' in its name"),
        (["--suite", "fast"], "invalid choice: 'fast'"),
        (["--providers", "cudnn"], "invalid choice: 'cudnn'"),
        (["--seconds", "-1"], "--seconds should be positive and finite, got -1.0"),
        (["--processes", "0"], "--processes should be positive"),
        (["--largest", "nan"], "--largest should be positive"),
        (["--json", "/dev/null"], "it is no ordinary file"),
        (["--json", str(BENCH)], "it is no ordinary file"),
        (["--json", str(BENCH / "run.py" / "x.json")], "--json should name a file that can be written"),
        (["--device", "cpu", "--dtype", "tf32"], "needs a GPU"),
        *([(["--device", "cuda"], "torch sees no GPU")] if not torch.cuda.is_available() else []),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# --- cases and floors


def test_cases_have_names_of_their_own() -> None:
    assert len(WORKLOADS) == 19
    assert all(case.source for case in WORKLOADS)
    for device in ("cpu", "cuda"):
        for name in SUITES:
            for quick in (False, True):
                found = suite(name, device, quick=quick)
                assert len({case.name for case in found}) == len(found)
                assert all(case.suite == name and case.dtype in cases.DTYPES for case in found)
            assert {case.dtype for case in suite(name, device, "bf16")} == {"bf16"}
    assert {c.dtype for c in suite("workloads", "cuda")} == {"tf32", "bf16", "fp16"}


def test_floors() -> None:
    case = Case("", 2, 3, 5, 7, "fp32", layers=2, bidirectional=True)
    # rows of T steps meet W_ih, of T - 1 steps W_hh: the first state is zero
    products = 2 * 2 * (2 * 4 * 7 * (3 * 5 + 2 * 7) + 2 * 4 * 7 * (3 * 14 + 2 * 7))
    assert case.flop("inference") == products
    assert case.flop("training") == 3 * products
    projected = replace(case, layers=1, bidirectional=False, proj=4)
    assert projected.flop("inference") == 2 * 2 * (4 * 7 * (3 * 5 + 2 * 4) + 3 * 7 * 4)
    assert case.flop("inference", 0.5) < case.flop("inference") / 2
    assert cases.floor(case, "training", {}) is None
    cpu = cases.floor(case, "inference", {"flop_per_us": {"fp32": 100.0}})
    assert cpu == {"floor_us": products / 100, "floor_products_us": products / 100}
    gpu = {"flop_per_us": {"bf16": 1e9}, "bytes_per_us": 1e6}
    found = cases.floor(Case("", 16, 100, 512, 512, "bf16"), "training", gpu)
    assert found["floor_memory_us"] == 2 * 16 * 100 * 2 * (512 + 512) / 1e6
    assert found["floor_us"] == max(found["floor_products_us"], found["floor_memory_us"])


# --- comparing


def record(case: Case, ratio: list[float], **more: Any) -> dict[str, Any]:
    found = asdict(case) | {"mode": "training", "provider": "fused", "us": [1.0, 1.0, 1.0], "us_per_step": 1.0}
    return found | {"ratio": {"torch": ratio}, "rounds": 9, "processes": 2} | more


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        ([0.82, 0.83, 0.85], "slower"),
        ([1.18, 1.25, 1.3], "faster"),
        ([0.93, 0.94, 0.95], "same"),  # less than the threshold
        ([0.7, 0.83, 1.0], "same"),  # that noisy
    ],
)
def test_changes_beyond_the_noise_are_flagged(ratio: list[float], verdict: str, tmp_path: Path) -> None:
    old, new = [record(TINY, [0.98, 1.0, 1.02])], [record(TINY, ratio)]
    (change,) = compare.changes(old, new, 0.1)
    assert change.verdict == verdict
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, records in zip(files, (old, new), strict=True):
        file.write_text(json.dumps({"about": {}, "records": records}))
    assert compare.main([str(f) for f in files]) == (verdict == "slower")


def test_nothing_compared_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.tell([]) == 2
    assert "nothing was compared" in capsys.readouterr().err


def test_what_is_lost_or_larger_is_flagged(capsys: pytest.CaptureFixture[str]) -> None:
    old = [record(replace(TINY, name=n), [1.0, 1.0, 1.0], peak_bytes=100) for n in ("a", "b", "c")]
    new = [record(replace(TINY, name="b"), [1.0, 1.0, 1.0], peak_bytes=120), copy.deepcopy(old[2])]
    new[1] = {k: v for k, v in new[1].items() if k not in ("us", "ratio")} | {"refused": "wrong result, not timed"}
    found = list(compare.changes(old, new, 0.05))
    assert [c.verdict for c in found] == ["lost", "same", "larger", "lost"]
    assert compare.tell(found) == 1
    said = capsys.readouterr().out
    assert "c, fp32, training, fused: wrong result, not timed" in said
    assert "3 changes for the worse" in said


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.2, "slower"), (0.8, "faster")])
def test_from_rounds_to_a_verdict(factor: float, verdict: str) -> None:
    """On made-up times: whether all of a machine is at half its speed, or a round is disturbed, does not count."""

    def records(factor: float, busy: float) -> list[dict[str, Any]]:
        torchs = [busy * us for us in (100.0, 101.0, 99.0, 100.0, 102.0, 100.0, 100.0, 98.0, 100.0)]
        fused = [factor * us / 2 for us in torchs]
        fused[4] *= 5
        rows = [
            {**asdict(TINY), "mode": "inference", "provider": name, "plan": "", "rounds_us": rounds}
            for name, rounds in (("torch", torchs), ("fused", fused))
        ]
        return run.merged(TINY, ["inference"], [{"result": rows, "providers": ["torch", "fused"]}] * 2, {})

    (change,) = compare.changes(records(1.0, 1.0), records(factor, 2.0), 0.05)
    assert change.verdict == verdict
    assert change.factor == pytest.approx(1 / factor)


def test_comparing_says_what_it_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("[]")
    for arguments, message in (
        ([], "expected two result files, or --base REV; got nothing"),
        ([str(tmp_path / "x.json")] * 2, "expected result files of bench/run.py (TypeError"),
        (["--threshold", "2", "a", "b"], "--threshold should be between 0 and 1, got 2.0"),
    ):
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert message in capsys.readouterr().err


# --- summaries and the report


def test_spread_covers_the_processes() -> None:
    low, median, high = run.summary([[1.0, 1.0, 1.1], [2.0, 2.0, 2.1]])
    assert (low, high) == (1.0, 2.0)
    assert 1.0 < median < 2.1
    assert run.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert not math.isnan(run.geometric_mean([0.5]))


def test_the_report_names_what_is_slower() -> None:
    slow, fast = replace(TINY, name="slow one"), replace(TINY, name="fast one")
    records = [record(slow, [0.8, 0.85, 0.9]), record(fast, [1.8, 1.9, 2.0]), record(TINY, [0.9, 0.98, 1.1])]
    refused = {"mode": "training", "provider": "fused", "refused": "not run: too big"}
    records.append(asdict(replace(TINY, name="big one")) | refused)
    about = {"device": "A CPU", "kind": "cpu", "threads": 2, "date": "2026-01-01T00:00:00", "commit": "0" * 40, "torch": "2"}
    results = report.Results(Path("x.json"), {"about": about, "records": records, "complete": True})
    page = report.page([results], {})
    listed = page.split("### Where nn.LSTM is still faster")[1].split("###")[0]
    assert "Of 3 calls measured, 2 have a ratio below 1, 1 of them by more than the spread" in listed
    assert listed.index("slow one") < listed.index("tiny")
    assert "fast one" not in listed
    assert "workloads, tiny, fp32, training: 0.98 (0.90-1.10), within the spread" in listed
    assert "fused_lstm: not run: too big (big one)" in page
    mean = report.times(run.geometric_mean([0.85, 1.9, 0.98]))
    assert f"plain sequences: {mean}x in training (3 cases)" in report.summary(results)
    failed = report.Results(
        Path("x.json"), results.data | {"checks_failed": ["a check"], "checks": {"a check": {"failed": "!"}}}
    )
    assert "**Failed: a check.**" in report.page([failed], {})


def test_files_that_hold_no_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no results of bench/run\.py"):
        report.load([tmp_path / "a.json"])


def test_committed_reports_agree_with_the_committed_results() -> None:
    """Their text word for word, their charts by the digest of the numbers that they were drawn from."""
    folder = BENCH / "results"
    found = report.load(sorted(folder.glob("*.json")))
    text = (folder / "README.md").read_text()
    charts = {r.slug: [name for name in report.CHARTS if (folder / f"{r.slug}-{name}-light.svg").exists()] for r in found}
    assert report.page(found, charts) == text
    for results in found:
        for name in charts[results.slug]:
            for theme in ("light", "dark"):
                assert f"numbers: {results.digest}" in (folder / f"{results.slug}-{name}-{theme}.svg").read_text()
    readme = (BENCH.parent / "README.md").read_text()
    shown = readme.split(report.MARKS[0])[1].split(report.MARKS[1])[0]
    assert shown == report.readme_part(found)
