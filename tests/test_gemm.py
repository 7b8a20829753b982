"""torch's switches for fp32 products on a GPU, with a stand-in for a tensor that would be there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from fused_lstm import gemm

ON_CUDA = SimpleNamespace(is_cuda=True, dtype=torch.float32)
PRECISION = getattr(torch._C, "_get_fp32_precision_getter", None)
SET_PRECISION = getattr(torch._C, "_set_fp32_precision_setter", None)
SWITCHES = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "rnn"), ("mkldnn", "matmul"))


def usual() -> None:
    """The switches as tests/conftest.py leaves them."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if PRECISION is not None:
        for switch in (*SWITCHES[:3], ("mkldnn", "matmul")):
            SET_PRECISION(*switch, "none")


@pytest.fixture(autouse=True)
def _usual_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch's own test utilities, once another test imports them, forbid to set switches.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    yield
    usual()


def seen() -> list[object]:
    """What the switches say: torch raises where one of the older ones differs from the newer ones."""
    found: list[object] = [PRECISION(*switch) for switch in SWITCHES] if PRECISION is not None else []
    for older in (torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(older())
        except RuntimeError:
            found.append("raises")
    return found


@pytest.mark.skipif(PRECISION is None, reason="this torch has no switch for each kind of op")
@pytest.mark.parametrize("older", ["highest", "high", "medium", "cudnn"])
@pytest.mark.parametrize(
    "switches",
    [
        "", "generic.all=tf32", "generic.all=ieee", "generic.all=bf16", "cuda.all=tf32", "cuda.matmul=tf32", "cuda.rnn=none",
        "cuda.rnn=tf32", "generic.all=ieee cuda.rnn=tf32", "generic.all=ieee cuda.matmul=ieee cuda.rnn=tf32",
        "generic.all=tf32 cuda.all=tf32 cuda.rnn=ieee", "cuda.all=tf32 cuda.matmul=tf32 cuda.rnn=ieee",
    ],
)  # fmt: skip
def test_products_go_by_the_switch_of_cudnn_and_none_is_changed(switches: str, older: str) -> None:
    """Not for later changes of the general switches either, which reach those that inherit."""

    def story(call: bool) -> list[list[object]]:
        usual()
        if older == "cudnn":
            torch.backends.cudnn.allow_tf32 = True
        elif older != "highest":
            torch.set_float32_matmul_precision(older)
        for switch in switches.split():
            name, value = switch.split("=")
            SET_PRECISION(*name.split("."), value)
        if call:
            with gemm.tf32_as_cudnn(ON_CUDA):
                products, rnn = (PRECISION("cuda", op) == "tf32" for op in ("matmul", "rnn"))
                assert products == rnn == gemm.tf32_allowed()
        found = [seen()]
        for switch in ("generic.all", "cuda.all"):
            for value in ("tf32", "ieee", "none"):
                SET_PRECISION(*switch.split("."), value)
                found.append(seen())
        return found

    assert story(call=True) == story(call=False)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_a_torch_with_one_switch_for_products(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision(before)
    monkeypatch.setattr(gemm, "_precision", None)
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        with gemm.tf32_as_cudnn(ON_CUDA):
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == before


def test_of_several_threads_the_last_one_puts_the_switch_back() -> None:
    torch.backends.cudnn.allow_tf32 = True
    before, one, other = seen(), gemm.tf32_as_cudnn(ON_CUDA), gemm.tf32_as_cudnn(ON_CUDA)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        first.submit(one.__enter__).result()
        second.submit(other.__enter__).result()
        first.submit(one.__exit__, None, None, None).result()
        assert torch._C._get_cublas_allow_tf32(), "the second one's products"
        second.submit(other.__exit__, None, None, None).result()
    assert seen() == before


def test_many_threads() -> None:
    torch.backends.cudnn.allow_tf32 = True
    before = seen()

    def calls() -> bool:
        right = True
        for _ in range(300):
            with gemm.tf32_as_cudnn(ON_CUDA):
                right &= torch._C._get_cublas_allow_tf32()
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: calls(), range(8)))
    assert seen() == before
