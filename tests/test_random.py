"""Random configurations against torch.nn.LSTM by the error rule: 300 on the backends of a CPU, 160 on the kernels.

What "auto" takes on a CPU runs as the backend that it takes (test_plan.py).
"""

import pytest
import torch
from checks import CPU_WAYS, KERNELS_WAYS, Config, Rule, add_config

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_300_random_configurations(dtype: torch.dtype) -> None:
    rules = {way: Rule() for way in CPU_WAYS}
    for seed in range(DTYPES.index(dtype), 300, len(DTYPES)):
        add_config(rules, Config.random(seed, dtype, largest=70))
    for rule in rules.values():
        rule.check()


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_160_random_configurations_on_the_kernels(dtype: torch.dtype) -> None:
    """With recompute and without it in turn: the kernels are the same."""
    rule = Rule()
    for n, seed in enumerate(range(DTYPES.index(dtype), 160, len(DTYPES))):
        add_config({KERNELS_WAYS[n % 2]: rule}, Config.random(seed, dtype, largest=40))
    rule.check()
