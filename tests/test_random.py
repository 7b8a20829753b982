"""300 random configurations against torch.nn.LSTM, on every backend (160 on the kernels), by the error rule."""

import pytest
import torch
from checks import Config, Rule, add_config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "aten", "reference", pytest.param("triton", marks=pytest.mark.kernels)])
def test_300_random_configurations(backend: str, dtype: torch.dtype) -> None:
    rule = Rule()
    for seed in range(DTYPES.index(dtype), 160 if backend == "triton" else 300, len(DTYPES)):
        add_config(rule, Config.random(seed, dtype, largest=40 if backend == "triton" else 70), backend)
    rule.check()
