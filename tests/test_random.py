"""300 random configurations against torch.nn.LSTM, on every backend, by the error rule."""

import pytest
import torch
from checks import Config, Rule, add_config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def run(backend: str, seeds: range, largest: int) -> None:
    rule = Rule()
    for seed in seeds:
        add_config(rule, Config.random(seed, DTYPES, largest), backend)
    rule.check()


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("block", range(4))
def test_random_configurations(backend: str, block: int) -> None:
    run(backend, range(75 * block, 75 * (block + 1)), largest=70)


@pytest.mark.kernels
@pytest.mark.parametrize("block", range(4))
def test_random_configurations_of_the_kernels(block: int) -> None:
    run("triton", range(75 * block, 75 * (block + 1)), largest=40)
