"""Which configuration runs on which device: a pure choice, tested without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fused_lstm.launch import choice, persistent
from fused_lstm.launch.choice import (
    BY_NAME,
    STEPWISE,
    Table,
    Timing,
    choose,
    describe,
    entry,
    file_name,
    kernels,
    key_of,
    read_table,
    tables,
    user_folder,
    write_table,
)
from fused_lstm.launch.schedule import Device, Recurrence, arithmetic, power_of_two
from fused_lstm.launch.stepwise import StepwiseConfig

H100 = Device("NVIDIA H100 80GB HBM3", 132, 227 * 1024, (9, 0))
A100 = Device("NVIDIA A100-SXM4-80GB", 108, 163 * 1024, (8, 0))
MI300 = Device("AMD Instinct MI300X", 304, 64 * 1024)
SLICE = replace(H100, name="a seventh of an H100", multiprocessors=16)


def problem(kernel: str = "forward", kind: str = "half", T: int = 100, H: int = 512, B: int = 64, R: int = 1) -> Recurrence:
    return Recurrence(kernel, kind, T, H, B, R)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["half", "tf32"])
def test_a_gpu_of_nvidia_takes_the_persistent_schedule(kind: str, kernel: str) -> None:
    for device in (H100, A100):
        for H in (64, 256, 512, 768) if kind == "half" else (256, 512):
            p = problem(kernel, kind, H=H, B=16)
            choice = choose(p, device)
            assert choice.config.schedule == "persistent", (device, p)
            assert persistent.refusal(choice.config, p, device) is None
            assert "one launch for the whole sequence" in describe(choice, p, device)


@pytest.mark.parametrize("device", [H100, A100, SLICE, MI300, replace(A100, shared_memory=64 * 1024)])
@pytest.mark.parametrize("kind", ["half", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_no_choice_exceeds_the_device(kernel: str, kind: str, device: Device) -> None:
    for H in (16, 80, 512, 1024, 4096):
        for B in (1, 33, 2000):
            for R in (1, 2, 7):
                p = problem(kernel, kind, H=H, B=B, R=R)
                config = choose(p, device).config
                assert BY_NAME[config.schedule].refusal(config, p, device) is None
                if config.schedule == "stepwise":
                    x, y, z = config.grid(H, B, R)
                    assert (x * config.block_h >= H, y * config.block_b >= B, z) == (True, True, R)


@pytest.mark.parametrize(
    ("device", "kind", "why"),
    [
        (MI300, "half", "needs an NVIDIA GPU of compute capability 8.0 or newer"),
        (replace(H100, capability=(7, 5)), "half", "needs an NVIDIA GPU of compute capability 8.0 or newer"),
        (H100, "fp32", "not in fp32"),
        (H100, "fp64", "not in fp64"),
        (replace(H100, multiprocessors=4), "half", "finds no room for the weights of H = 1024"),
        (replace(H100, shared_memory=1024), "half", "finds no room for the weights of H = 1024"),
    ],
)
def test_what_does_not_fit_falls_to_a_launch_for_each_step_and_says_why(device: Device, kind: str, why: str) -> None:
    p = problem(kind=kind, H=1024)
    choice = choose(p, device)
    assert choice.config.schedule == "stepwise"
    assert choice.reason.startswith("a launch for each step, since no other schedule fits: the persistent one ")
    assert why in choice.reason
    words = describe(choice, p, device)
    assert words.startswith("100 launches, one for each time step")
    assert words.endswith(f"not measured on {device.name})")


def test_norms_are_taken_where_one_program_owns_all_units() -> None:
    p = replace(problem(H=64), cell="layer_norm=state")
    assert choose(p, H100).config == choose(replace(p, B=8192), H100).config == persistent.local(64)
    with pytest.raises(ValueError, match="takes norms only where one program owns all units"):
        persistent.fragments(persistent.PersistentConfig(), 64, 1, 1, relative=p.relative)
    for other, why in ((replace(p, H=65), "at most 64"), (replace(p, arithmetic="fp32"), "not in fp32")):
        words = describe(choose(other, H100), other, H100)
        assert words.startswith("for each of 100 steps a GEMM and a launch of 64 programs, one for each row (")
        assert why in words


def test_a_single_step_is_one_ordinary_launch() -> None:
    choice = choose(problem(T=1), H100)
    assert choice.config.schedule == "stepwise"
    assert choice.reason == "one step"


def test_what_is_compiled_depends_little_on_the_batch_and_not_on_time() -> None:
    for kernel in ("forward", "backward"):
        made = set()
        for B in range(1, 513):
            config = choose(problem(kernel, B=B), H100).config
            made.add(persistent.fragments(config, 512, 1, 1) if config.schedule == "persistent" else config)
        assert len(made) < 12
        assert len({choose(problem(kernel, T=T), H100).config for T in range(2, 513)}) == 1


def test_the_model_of_the_stepwise_schedule_knows_what_costs_time() -> None:
    p = problem()
    config = StepwiseConfig(64, 16, 64)
    time = STEPWISE.estimate(config, p, H100)
    assert STEPWISE.estimate(config, replace(p, T=200), H100) == 2 * time
    assert STEPWISE.estimate(config, replace(p, H=2048), H100) > time
    assert STEPWISE.estimate(config, replace(p, B=8192), H100) > 2 * time  # several waves
    assert STEPWISE.estimate(config, p, SLICE) > time


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_b": 8}, "block_b should be an integer from 16 to 1024, got 8"),
        ({"block_b": 64.0}, "block_b should be an integer from 16 to 1024, got 64.0"),
        ({"block_h": 48}, "block_h should be a power of two, got 48"),
        ({"num_warps": 3}, "num_warps should be a power of two from 1 to 32, got 3"),
        ({"num_stages": -1}, "num_stages should be an integer from 1 to 10, got -1"),
        ({"max_registers": "x"}, "max_registers should be an integer from 24 to 255, got 'x'"),
    ],
)
def test_configurations_that_make_no_sense(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepwiseConfig(**{"block_b": 64, "block_h": 16, "block_k": 64} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "half"}, "form should be 'whole', 'split' or 'local', got 'half'"),
        ({"units": 8}, "units should be an integer of at least 16, got 8"),
        ({"tiles": 0}, "tiles should be an integer of at least 1, got 0"),
        ({"held": 1.0}, "held should be an integer of at least 0, got 1.0"),
    ],
)
def test_persistent_configurations_that_make_no_sense(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        persistent.PersistentConfig(**change)


def test_arithmetic_and_powers() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert arithmetic(torch.float32, True) == "tf32"
    assert arithmetic(torch.float32, False) == "fp32"
    assert arithmetic(torch.bfloat16, True) == arithmetic(torch.float16, False) == "half"


# --- Measured tables


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSED_LSTM_CONFIGS", str(tmp_path / "mine"))
    tables.cache_clear()
    yield user_folder()
    tables.cache_clear()


def test_what_was_measured_is_taken(folder: Path) -> None:
    p, config = problem(B=60), persistent.PersistentConfig(tiles=8, held=3)
    assert choose(p, H100, tables(H100.name)).config != config
    write_table(folder / file_name(H100.name), [entry(p, config, 1.5)])
    choice = choose(p, H100, tables(H100.name))
    assert (choice.config, choice.measured) == (config, True)
    words = describe(choice, p, H100)
    assert f"measured on {H100.name}" in words
    assert "not measured" not in words
    assert str(folder) in words
    assert choose(replace(p, B=33), H100, tables(H100.name)).measured  # the same power of two
    for other in (
        replace(p, B=65),
        replace(p, H=528),
        replace(p, R=2),
        replace(p, kernel="backward"),
        replace(p, cell="peephole"),
    ):
        assert not choose(other, H100, tables(H100.name)).measured
    assert not tables(A100.name)


def test_what_was_measured_is_not_taken_where_it_cannot_run() -> None:
    p, config = problem(H=1024, B=1), persistent.PersistentConfig(held=3)
    table = Table("somewhere", {key_of(p): config})
    assert choose(p, H100, [table]).measured
    assert not choose(p, SLICE, [table]).measured


def test_a_later_measurement_replaces_an_earlier_one_and_keeps_the_others(folder: Path) -> None:
    path = folder / file_name(H100.name)
    a, b = StepwiseConfig(32, 16, 64), StepwiseConfig(64, 16, 64)
    write_table(path, [entry(problem(), a, 2.0), entry(problem(H=64), a, 1.0)])
    write_table(path, [entry(problem(), b, 1.0, date="today")])
    table = read_table(path)
    assert table.configs == {key_of(problem()): b, key_of(problem(H=64)): a}
    assert [e.get("date") for e in json.loads(path.read_text())["configs"]] == ["today", None]


def test_timings_of_other_kernels_go_when_new_ones_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / file_name(H100.name)
    a, b = (Timing("float16", False, False, T, 16, 512, 512, 1, 1, 0, 2.0, 3.0) for T in (100, 1))
    write_table(path, [], [a])
    write_table(path, [], [b, a._replace(torch_us=9.0)])
    table = read_table(path)
    assert (table.timings, table.kernels) == ((a._replace(torch_us=9.0), b), kernels())
    assert table.nearest(a._replace(T=40)).T == 100
    assert table.nearest(a._replace(T=3)).T == 1
    monkeypatch.setattr(choice, "kernels", lambda: "others")
    write_table(path, [entry(problem(), StepwiseConfig(32, 16, 64), 2.0)])
    assert read_table(path).timings == ()


GOOD = {"kernel": "forward", "arithmetic": "half", "H": 64, "B": 1, "R": 1}
TILES = {"schedule": "stepwise", "block_b": 16, "block_h": 16, "block_k": 16}


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        '{"configs": [], "timings": [{"dtype": "float16"}]}',
        "{}",
        '{"configs": {}}',
        '{"configs": [{"H": 1}]}',
        json.dumps({"configs": [{**GOOD, "kernel": "sideways", "config": TILES}]}),
        json.dumps({"configs": [{**GOOD, "B": 64.0, "config": TILES}]}),
        json.dumps({"configs": [{**GOOD, "config": {**TILES, "block_b": 1}}]}),
    ],
)
def test_a_broken_table_is_an_error_that_names_the_file(folder: Path, text: str) -> None:
    path = folder / file_name(H100.name)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for use in (lambda: tables(H100.name), lambda: write_table(path, [entry(problem(), StepwiseConfig(16, 16, 16), 1.0)])):
        with pytest.raises(ValueError, match=f"{path.name} is not a table of launch configurations"):
            use()


def test_a_folder_that_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "table.json"
    file.write_text("{}")
    monkeypatch.setenv("FUSED_LSTM_CONFIGS", str(file))
    with pytest.raises(ValueError, match="FUSED_LSTM_CONFIGS should name a folder"):
        user_folder()
    monkeypatch.setenv("FUSED_LSTM_CONFIGS", "~/nowhere")
    assert user_folder() == Path.home() / "nowhere"
