"""Which configuration runs on which device: a pure choice, tested without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fused_lstm.launch.choose import (
    Table,
    choose,
    describe,
    entry,
    file_name,
    key_of,
    read_table,
    tables,
    user_folder,
    write_table,
)
from fused_lstm.launch.config import Device, LaunchConfig, Recurrence, arithmetic, power_of_two
from fused_lstm.launch.schedules import estimate, persistent, refusal, rounds, stepwise_candidates

H100 = Device("NVIDIA H100 80GB HBM3", 132, 227 * 1024, wgmma=True)
A100 = Device("NVIDIA A100-SXM4-80GB", 108, 163 * 1024)
SLICE = replace(H100, name="a seventh of an H100", multiprocessors=16)


def problem(kernel: str = "forward", kind: str = "half", T: int = 100, H: int = 512, B: int = 64, R: int = 1) -> Recurrence:
    return Recurrence(kernel, kind, T, H, B, R)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("B", [1, 16, 64])
@pytest.mark.parametrize("H", [64, 128, 256, 512, 528, 640, 656, 768, 1024, 1152])
def test_an_h100_keeps_half_precision_weights_on_chip(kernel: str, H: int, B: int) -> None:
    p = problem(kernel, H=H, B=B)
    config = choose(p, H100).config
    assert config.schedule == "persistent"
    assert config.resident == config.tiles(H)
    assert refusal(config, p, H100) is None


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["tf32", "fp32"])
def test_fp32_weights_stay_on_chip_up_to_512(kernel: str, kind: str) -> None:
    for H in (64, 128, 256, 512):
        config = choose(problem(kernel, kind, H=H, B=16), H100).config
        assert config.schedule == "persistent"
        assert config.resident == config.tiles(H)
    config = choose(problem(kernel, kind, H=1152, B=16), H100).config
    assert config.resident < config.tiles(1152)


@pytest.mark.parametrize("device", [H100, A100, SLICE, replace(A100, shared_memory=64 * 1024)])
@pytest.mark.parametrize("kind", ["half", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_no_choice_exceeds_the_device(kernel: str, kind: str, device: Device) -> None:
    for H in (16, 80, 512, 1024, 4096):
        for B in (1, 33, 2000):
            for R in (1, 2, 7):
                p = problem(kernel, kind, H=H, B=B, R=R)
                config = choose(p, device).config
                config.check(H)
                x, y, z = config.grid(H, B, R)
                assert y * config.rows >= B
                assert x * config.block_h >= H
                if config.schedule == "persistent":
                    assert config.shared_memory(p) <= device.shared_memory
                    if not config.local(H):
                        n = rounds(config, p, device)
                        assert x * z * -(-y // n) <= device.multiprocessors


def test_one_hidden_tile_needs_no_barrier() -> None:
    for kernel in ("forward", "backward"):
        p = problem(kernel, H=64, B=4096)
        config = choose(p, H100).config
        assert config.local(64)
        assert rounds(config, p, H100) == 1  # however many programs: none waits for another
        assert "no barrier" in describe(choose(p, H100), p, H100)


def test_batches_too_large_for_one_launch_take_several() -> None:
    p = problem(H=512, B=8192)
    config = choose(p, H100).config
    assert rounds(config, p, H100) > 1
    assert f"{rounds(config, p, H100)} launches, each for the whole sequence" in describe(choose(p, H100), p, H100)


def test_what_does_not_fit_falls_to_a_launch_for_each_step_and_says_why() -> None:
    tiny = replace(H100, multiprocessors=4)
    p = problem(H=1024)
    choice = choose(p, tiny)
    assert choice.config.schedule == "stepwise"
    assert "no persistent schedule fits" in choice.reason
    assert f"{tiny.name} runs 4" in choice.reason
    words = describe(choice, p, tiny)
    assert words.startswith("100 launches, one for each time step")
    assert words.endswith(f"not measured on {tiny.name})")
    poor = replace(H100, shared_memory=1024)
    assert "bytes of shared memory" in choose(p, poor).reason
    unknown = replace(H100, shared_memory=0)
    assert "is not known" in choose(p, unknown).reason


def test_a_single_step_is_one_ordinary_launch() -> None:
    choice = choose(problem(T=1), H100)
    assert choice.config.schedule == "stepwise"
    assert choice.reason == "one step, one launch"


def test_without_wgmma_nothing_is_kept_in_shared_memory() -> None:
    for kernel in ("forward", "backward"):
        assert not any(c.resident for c in persistent(problem(kernel), A100))
        assert any(c.resident for c in persistent(problem(kernel), H100))


def test_what_is_compiled_does_not_depend_on_the_batch_but_for_a_few_classes() -> None:
    for kernel in ("forward", "backward"):
        assert len({choose(problem(kernel, B=B), H100).config for B in range(1, 513)}) < 12
        assert len({choose(problem(kernel, T=T), H100).config for T in range(2, 513)}) == 1


def test_the_model_knows_what_costs_time() -> None:
    p = problem()
    config = LaunchConfig(64, 16, 64, schedule="persistent", resident=8)
    time = estimate(config, p, H100)
    assert estimate(config, replace(p, T=200), H100) == 2 * time
    assert estimate(replace(config, resident=0), p, H100) > time  # streams its weights
    assert estimate(replace(config, schedule="stepwise", resident=0), p, H100) > time  # launches
    assert estimate(config, replace(p, B=8192), H100) > 2 * time  # several rounds
    assert min(stepwise_candidates(p), key=lambda c: estimate(c, p, H100)) in set(stepwise_candidates(p))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_b": 8}, "block_b should be an integer from 16 to 1024, got 8"),
        ({"block_b": 64.0}, "block_b should be an integer from 16 to 1024, got 64.0"),
        ({"block_h": 48}, "block_h should be a power of two, got 48"),
        ({"rows": 65}, "rows should be an integer from 1 to 64, got 65"),
        ({"num_warps": 3}, "num_warps should be a power of two from 1 to 32, got 3"),
        ({"num_stages": -1}, "num_stages should be an integer from 1 to 10, got -1"),
        ({"resident": -1}, "resident should be an integer of at least 0, got -1"),
        ({"ahead": -3}, "ahead should be an integer of at least 0, got -3"),
        ({"max_registers": "x"}, "max_registers should be an integer from 24 to 255, got 'x'"),
        ({"schedule": "no"}, "schedule should be one of stepwise, persistent, got 'no'"),
        ({"swap": 1}, "swap should be a bool, got 1"),
        ({"resident": 1, "schedule": "stepwise"}, "resident weights need the persistent schedule"),
        ({"swap": True, "schedule": "stepwise"}, "swap and rows need the persistent schedule"),
        ({"rows": 3, "schedule": "stepwise"}, "swap and rows need the persistent schedule"),
    ],
)
def test_configurations_that_make_no_sense(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchConfig(**{"block_b": 64, "block_h": 16, "block_k": 64, "schedule": "persistent"} | change)


def test_configurations_that_do_not_fit_a_size() -> None:
    with pytest.raises(ValueError, match="at most the 2 tiles of H = 128, got 3"):
        LaunchConfig(64, 16, 64, schedule="persistent", resident=3).check(128)
    with pytest.raises(ValueError, match="block_k should be block_h and resident 1, got 64 and 1"):
        LaunchConfig(64, 128, 64, schedule="persistent", resident=1).check(128)


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
    p, config = problem(B=60), LaunchConfig(32, 16, 64, schedule="persistent", resident=8)
    assert choose(p, H100, tables(H100.name)).config != config
    write_table(folder / file_name(H100.name), [entry(p, config, 1.5)])
    choice = choose(p, H100, tables(H100.name))
    assert (choice.config, choice.measured) == (config, True)
    words = describe(choice, p, H100)
    assert f"measured on {H100.name}" in words
    assert "not measured" not in words
    assert str(folder) in words
    assert choose(replace(p, B=33), H100, tables(H100.name)).measured  # the same power of two
    for other in (replace(p, B=65), replace(p, H=528), replace(p, R=2), replace(p, kernel="backward")):
        assert not choose(other, H100, tables(H100.name)).measured
    assert not tables(A100.name)


def test_what_was_measured_is_not_taken_where_it_cannot_run() -> None:
    p, config = problem(H=1024, B=1), LaunchConfig(64, 16, 64, schedule="persistent", resident=16)
    table = Table("somewhere", {key_of(p): config})
    assert choose(p, H100, [table]).measured
    assert not choose(p, SLICE, [table]).measured


def test_a_later_measurement_replaces_an_earlier_one_and_keeps_the_others(folder: Path) -> None:
    path = folder / file_name(H100.name)
    a, b = LaunchConfig(32, 16, 64), LaunchConfig(64, 16, 64)
    write_table(path, [entry(problem(), a, 2.0), entry(problem(H=64), a, 1.0)])
    write_table(path, [entry(problem(), b, 1.0, date="today")])
    table = read_table(path)
    assert table.configs == {key_of(problem()): b, key_of(problem(H=64)): a}
    assert [e.get("date") for e in json.loads(path.read_text())["configs"]] == ["today", None]


GOOD = {"kernel": "forward", "arithmetic": "half", "H": 64, "B": 1, "R": 1}
TILES = {"block_b": 16, "block_h": 16, "block_k": 16}


@pytest.mark.parametrize(
    "text",
    [
        "not json",
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
    for use in (lambda: tables(H100.name), lambda: write_table(path, [entry(problem(), LaunchConfig(16, 16, 16), 1.0)])):
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
