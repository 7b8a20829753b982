"""recompute=True: the same results from less memory."""

from __future__ import annotations

import pytest
import torch
from checks import Config, Rule, add_config
from test_ragged import Ragged

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ["auto", "aten", "reference", pytest.param("triton", marks=pytest.mark.kernels)]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("nan_memory")
def test_300_random_configurations(backend: str, dtype: torch.dtype) -> None:
    rule = Rule()
    for seed in range(DTYPES.index(dtype), 300, len(DTYPES)):
        add_config(rule, Config.random(seed, dtype, largest=40 if backend == "triton" else 70), backend, recompute=True)
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("nan_memory")
def test_300_random_lengths_and_resets(backend: str, dtype: torch.dtype) -> None:
    rule = Rule()
    for seed in range(DTYPES.index(dtype), 300, len(DTYPES)):
        case = Ragged(seed, dtype)
        ours = case.fused(backend, recompute=True)
        rule.add(case, case.names, ours, case.row_by_row(case.dtype), case.row_by_row(torch.float64))
    rule.check()
