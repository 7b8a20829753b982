"""The shapes that real projects give an LSTM, with their sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    name: str
    source: str
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    dtype: str
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0


WORKLOADS = (
    Workload("flashrnn-grid", "FlashRNN kernel_speed_benchmark.py", 16, 1024, 768, 768, "bfloat16"),
    Workload("flashrnn-grid-fp16", "the same, where cuDNN is at its best", 16, 1024, 768, 768, "float16"),
    Workload("hydrology", "NeuralHydrology 531_basins.yml", 256, 365, 32, 128, "float32"),
    Workload("fastrnns", "pytorch benchmarks/fastrnns", 64, 100, 512, 512, "float32"),
    Workload("gnmt", "DeepLearningExamples GNMT, first layer", 128, 50, 1024, 1024, "float16", bidirectional=True),
    Workload("tf-gridnet-intra", "ESPnet TF-GridNet", 1503, 62, 192, 192, "float32", bidirectional=True),
    Workload("awd-lstm", "AWD-LSTM main.py", 80, 70, 400, 1150, "float32"),
    Workload("rnnt-predictor", "NeMo fast-conformer_transducer_bpe.yaml", 16, 100, 640, 640, "bfloat16"),
    Workload("rnnt-decode", "the same at decode time", 16, 1, 640, 640, "bfloat16"),
    Workload("cleanrl-ppo-atari", "CleanRL ppo_atari_lstm.py", 2, 128, 512, 128, "float32"),
    Workload("cleanrl-rollout", "the same, one step of inference", 8, 1, 512, 128, "float32"),
    Workload("pufferlib", "PufferLib default.ini", 2048, 16, 128, 128, "bfloat16"),
    Workload("rl-locomotion", "rl_games, rsl_rl; B assumed", 4096, 24, 256, 256, "float32"),
    Workload("torchrl-reset-bench", "TorchRL test_rnn_reset_backends_benchmark.py", 256, 128, 32, 512, "float32"),
    Workload("torchbeast", "TorchBeast monobeast.py", 8, 80, 519, 519, "float32", layers=2),
    Workload("tacotron2-encoder", "Tacotron 2", 48, 150, 512, 256, "float16", bidirectional=True),
    Workload("mlperf-rnnt-pre", "MLPerf RNN-T", 128, 557, 240, 1024, "float16", layers=2),
    Workload("bonito", "Bonito dna_r10.4.1 v4.3, one of 5 layers", 64, 1667, 1024, 1024, "float16"),
    Workload(
        "nemo-lstm-encoder",
        "NeMo lstm_transducer_bpe.yaml, 2 of 8 layers",
        16,
        200,
        640,
        2048,
        "bfloat16",
        layers=2,
        proj=640,
    ),
)
