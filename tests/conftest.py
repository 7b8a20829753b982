"""Which tests can run here. A test that cannot is skipped with its reason; `make test` runs both kinds of kernel tests."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
torch.backends.cudnn.allow_tf32 = False  # the yardstick is strict fp32
torch.set_num_threads(1)  # the tests are small, and pytest-xdist runs several of them

HAS_TRITON = importlib.util.find_spec("triton") is not None
HALVES = (torch.float16, torch.bfloat16)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if HAS_TRITON and INTERPRET:
    import quick_interpreter

    quick_interpreter.install()


def _reason(item: pytest.Item) -> str | None:
    if item.get_closest_marker("kernels") and not (HAS_TRITON and (INTERPRET or torch.cuda.is_available())):
        return "needs Triton, and either TRITON_INTERPRET=1 or a GPU"
    if item.get_closest_marker("compile") and (INTERPRET or not HAS_TRITON):
        return "needs Triton, without TRITON_INTERPRET=1"
    if item.get_closest_marker("gpu") and (INTERPRET or not torch.cuda.is_available()):
        return "needs a GPU"
    return None


def _holds_half(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return value in HALVES if isinstance(value, torch.dtype) else any(map(_holds_half, values))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "autocast" in item.name or "half_precision" in item.name or _holds_half(parameters):
            item.add_marker(pytest.mark.half)
        reason = _reason(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def nan_memory():
    """Every tensor that torch allocates uninitialized holds NaN, so that an element nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
