"""300 random configurations against torch.nn.LSTM, on every backend, by the error rule."""

import pytest
import torch
from checks import Config, check_config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("block", range(10))
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_random_configurations(backend: str, block: int) -> None:
    for seed in range(30 * block, 30 * (block + 1)):
        config = Config.random(seed, DTYPES, largest=70)
        try:
            check_config(config, backend)
        except Exception as error:
            raise AssertionError(f"{config}: {error}") from error


@pytest.mark.interpreter
@pytest.mark.parametrize("block", range(10))
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_random_configurations_in_the_interpreter(block: int) -> None:
    for seed in range(30 * block, 30 * (block + 1)):
        config = Config.random(seed, DTYPES, largest=40)
        try:
            check_config(config, "triton")
        except Exception as error:
            raise AssertionError(f"{config}: {error}") from error
