"""What is measured: the shapes that real projects give an LSTM, with their sources, suites of shapes around them, and the
least time that each may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

MODES = ("inference", "forward", "training")  # without gradients; keeping what a backward pass needs; with that pass
DTYPES = {  # tf32: fp32 tensors whose products may be rounded to TF32
    "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
TIMES_FORWARD = {"inference": 1, "forward": 1, "training": 3}  # products, in those of the forward pass


@dataclass(frozen=True)
class Case:
    """One call of an LSTM."""

    name: str
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    dtype: str
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    # "lengths": rows of T/4 to T steps; "packed": the same as a PackedSequence; "resets": 3% of the steps begin an episode
    variant: str = "plain"
    source: str = ""
    suite: str = "workloads"

    def widths(self) -> list[int]:
        """Input features of each layer."""
        return [self.I] + [(self.proj or self.H) * (1 + self.bidirectional)] * (self.layers - 1)

    def flop(self, mode: str = "training", filled: float = 1.0) -> float:
        """Floating-point operations of the matrix products, if a part of the steps is ``filled``, the rest past a length.

        The first step's state is zero, which nobody has to multiply.
        """
        P, steps = self.proj or self.H, self.T * filled
        total = 0.0
        for width in self.widths():
            total += steps * 2 * 4 * self.H * width + max(0.0, steps - 1) * 2 * 4 * self.H * P
            total += steps * 2 * self.H * P if self.proj else 0.0
        return TIMES_FORWARD[mode] * self.B * total * (1 + self.bidirectional)

    def shape(self) -> str:
        """In words, as the reports name it."""
        words = [f"B={self.B} T={self.T} I={self.I} H={self.H}"]
        words += [f"{self.layers} layers"] * (self.layers > 1) + ["bidirectional"] * self.bidirectional
        return " ".join(words + [f"proj={self.proj}"] * bool(self.proj))


WORKLOADS = (
    Case("flashrnn-grid", 16, 1024, 768, 768, "bf16", source="FlashRNN kernel_speed_benchmark.py"),
    Case("flashrnn-grid-fp16", 16, 1024, 768, 768, "fp16", source="the same, where cuDNN is at its best"),
    Case("hydrology", 256, 365, 32, 128, "fp32", source="NeuralHydrology 531_basins.yml"),
    Case("fastrnns", 64, 100, 512, 512, "fp32", source="pytorch benchmarks/fastrnns"),
    Case(
        "gnmt", 128, 50, 1024, 1024, "fp16", bidirectional=True, variant="lengths",
        source="DeepLearningExamples GNMT, first layer",
    ),
    Case("tf-gridnet-intra", 1503, 62, 192, 192, "fp32", bidirectional=True, source="ESPnet TF-GridNet"),
    Case("awd-lstm", 80, 70, 400, 1150, "fp32", source="AWD-LSTM main.py"),
    Case("rnnt-predictor", 16, 100, 640, 640, "bf16", variant="lengths", source="NeMo fast-conformer_transducer_bpe.yaml"),
    Case("rnnt-decode", 16, 1, 640, 640, "bf16", source="the same at decode time"),
    Case("cleanrl-ppo-atari", 2, 128, 512, 128, "fp32", variant="resets", source="CleanRL ppo_atari_lstm.py, a minibatch"),
    Case("cleanrl-rollout", 8, 1, 512, 128, "fp32", source="the same, one step of inference"),
    Case("pufferlib", 2048, 16, 128, 128, "bf16", variant="resets", source="PufferLib default.ini"),
    Case("rl-locomotion", 4096, 24, 256, 256, "fp32", variant="resets", source="rl_games, rsl_rl; B assumed"),
    Case(
        "torchrl-reset-bench", 256, 128, 32, 512, "fp32", variant="resets",
        source="TorchRL test_rnn_reset_backends_benchmark.py",
    ),
    Case("torchbeast", 8, 80, 519, 519, "fp32", layers=2, variant="resets", source="TorchBeast monobeast.py"),
    Case(
        "tacotron2-encoder", 48, 150, 512, 256, "fp16", bidirectional=True, variant="lengths", source="Tacotron 2",
    ),
    Case("mlperf-rnnt-pre", 128, 557, 240, 1024, "fp16", layers=2, variant="lengths", source="MLPerf RNN-T"),
    Case("bonito", 64, 1667, 1024, 1024, "fp16", source="Bonito dna_r10.4.1 v4.3, one of 5 layers"),
    Case(
        "nemo-lstm-encoder", 16, 200, 640, 2048, "bf16", layers=2, bidirectional=True, proj=640, variant="lengths",
        source="NeMo lstm_transducer_bpe.yaml, 2 of 8 layers",
    ),
)  # fmt: skip


def _grid(B: int, T: int, H: int) -> Case:
    return Case(f"B={B} T={T} H={H}", B, T, H, H, "", suite="grid")


def grid(quick: bool) -> Iterator[Case]:
    """H against B; then, at one of these points, T, directions, layers and dtypes."""
    hidden = (64, 128, 256, 512, 1024) if quick else (32, 64, 128, 256, 512, 1024, 2048)
    batch = (1, 16, 64, 256) if quick else (1, 16, 64, 256, 1024, 4096)
    steps = (16, 512) if quick else (1, 16, 512, 2048)
    # Quick: a row and a column of the whole.
    yield from (_grid(B, 128, H) for H in hidden for B in batch if not quick or B == 16 or H == 256)
    yield from (_grid(16, T, 256) for T in steps)
    yield replace(_grid(16, 128, 256), name="two directions", bidirectional=True)
    yield from (replace(_grid(16, 128, 256), name=f"{n} layers", layers=n) for n in ((2,) if quick else (2, 4)))
    yield from (replace(_grid(16, 128, 256), name=dtype, dtype=dtype) for dtype in DTYPES)


def latency(quick: bool) -> Iterator[Case]:
    for H in (128, 512) if quick else (128, 512, 1024):
        for B in (1, 16) if quick else (1, 4, 16):
            for T in (1, 8) if quick else (1, 2, 4, 8):
                yield Case(f"B={B} T={T} H={H}", B, T, H, H, "", suite="latency")


RAGGED = ((16, 128, 64, 128), (64, 100, 128, 128), (32, 64, 256, 256), (16, 200, 512, 512), (256, 64, 128, 256))


def ragged(variant: str, quick: bool) -> Iterator[Case]:
    for B, T, I, H in RAGGED[:3] if quick else RAGGED:  # noqa: E741
        yield Case(f"B={B} T={T} I={I} H={H}", B, T, I, H, "", variant=variant, suite=variant)


PACKED = ((16, 500, 64), (16, 50, 64), (64, 5, 64), (4, 2000, 64), (64, 128, 256))


def packed(quick: bool) -> Iterator[Case]:
    for B, T, H in PACKED[:2] if quick else PACKED:
        yield Case(f"B={B} T={T} H={H}", B, T, H, H, "", variant="packed", suite="packed")


def memory(quick: bool) -> Iterator[Case]:
    for B, T, H in ((16, 128, 128), (64, 128, 256), (64, 128, 512), (64, 512, 512))[: 3 if quick else 4]:
        yield Case(f"B={B} T={T} H={H}", B, T, H, H, "", suite="memory")


SUITES = ("workloads", "latency", "lengths", "packed", "resets", "memory", "grid")


def suite(name: str, device: str, dtype: str | None = None, quick: bool = False) -> list[Case]:
    """The cases of a suite. Without a ``dtype``, workloads have their own on CUDA, where fp32 is as torch's default has it
    (TF32), and fp32 on a CPU, where one would not use their half precision; other suites have bf16 and fp32."""
    if name == "workloads":
        cases: list[Case] = list(WORKLOADS)
    elif name in ("lengths", "resets"):
        cases = list(ragged(name, quick))
    else:
        cases = list({"grid": grid, "latency": latency, "memory": memory, "packed": packed}[name](quick))
    if device == "cpu":
        cases = [case for case in cases if case.dtype != "tf32"]
    if dtype:
        return list(dict.fromkeys(replace(case, dtype=dtype) for case in cases if case.name not in DTYPES))
    if name != "workloads":
        return [replace(case, dtype=case.dtype or ("fp32" if device == "cpu" else "bf16")) for case in cases]
    if device == "cpu":
        return [replace(case, dtype="fp32") for case in cases]
    return [replace(case, dtype="tf32" if case.dtype == "fp32" else case.dtype) for case in cases]


def floor(case: Case, mode: str, rates: dict[str, Any], filled: float = 1.0) -> dict[str, float] | None:
    """Microseconds that a case takes at least, and what they are made of; None where its dtype's rate was not measured.

    On a CPU they are those of all matrix products at the rate of a large one. On a GPU there are also those of the memory:
    inputs and outputs are read and written once, at the rate of a large copy. The larger of the two is the floor, since one
    may go on beside the other. With lengths, ``filled`` is the part of the steps that lie within one.
    """
    rate = rates.get("flop_per_us", {}).get(case.dtype)
    if rate is None:
        return None
    parts = {"products": case.flop(mode, filled) / rate}
    if "bytes_per_us" in rates:
        outputs = (case.proj or case.H) * (1 + case.bidirectional)
        once = filled * case.B * case.T * DTYPES[case.dtype].itemsize * (sum(case.widths()) + case.layers * outputs)
        parts["memory"] = once * (2 if mode == "training" else 1) / rates["bytes_per_us"]
    return {"floor_us": max(parts.values()), **{f"floor_{k}_us": v for k, v in parts.items()}}
