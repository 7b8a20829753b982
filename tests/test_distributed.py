"""Two processes on a CPU: examples/distributed.py as a user runs it, and fully_shard on the layer itself.

Run by torchrun, this file is what each process of the second test does.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pairs import all_equal, assert_all_close, flat, randn
from torch import nn

import fused_lstm

SCRIPT = Path(__file__).parents[1] / "examples" / "distributed.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def run(*args: object) -> str:
    """Standard output of a Python process, which must end well and warn of nothing."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+ loss (\S+)$", output, re.MULTILINE)]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The losses of one process."""
    return losses(run(SCRIPT, "--steps", 40, "--hidden", 32))


@needs_gloo
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(strategy: str, alone: list[float]) -> None:
    together = losses(run(*TORCHRUN, SCRIPT, "--steps", 40, "--hidden", 32, "--strategy", strategy))
    assert len(together) == 40
    assert together == pytest.approx(alone, rel=1e-3, abs=2e-6)
    assert together[-1] < 0.2 * together[0]


@needs_gloo
def test_a_sharded_layer_has_the_same_names_and_gradients() -> None:
    assert run(*TORCHRUN, __file__).count("as one process") == 2


def sharded_and_whole(**options: object) -> None:
    """The layer sharded over all processes, each with its part of the batch, against the whole layer on the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = fused_lstm.LSTM(5, 9, **options)  # 36 rows a weight, shared by two processes
    sharded = fused_lstm.LSTM(5, 9, **options)
    sharded.load_state_dict(whole.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)), reshard_after_forward=True)

    x = randn(7, 2 * world, 5, dtype=torch.float32)
    mine = x[:, 2 * rank : 2 * rank + 2]
    whole(x)[0].square().mean().backward()
    sharded(mine)[0].square().mean().backward()
    assert list(sharded.state_dict()) == list(whole.state_dict())
    assert sharded.weight_hh_l0.to_local().shape[0] == 4 * 9 // world
    grads = [[p.grad.full_tensor() for p in sharded.parameters()], [p.grad for p in whole.parameters()]]
    assert_all_close(*grads)

    gathered = {name: weight.full_tensor() for name, weight in sharded.state_dict().items()}
    names = ("num_layers", "proj_size", "bidirectional")
    theirs = nn.LSTM(5, 9, **{name: options[name] for name in names if name in options})
    theirs.load_state_dict(gathered)
    assert all_equal(list(theirs.parameters()), list(whole.parameters()))
    if not whole.bidirectional:
        with torch.no_grad():
            assert all_equal(flat(sharded.step(mine[0])), flat(whole.step(mine[0])))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")  # torch's own word on its LSTM
    sharded_and_whole()
    sharded_and_whole(num_layers=2, proj_size=3, bidirectional=True)
    sharded_and_whole(recompute=True)
    sharded_and_whole(backend="reference")
    dist.destroy_process_group()
    gc.collect()  # FSDP2's reference cycles hold gloo's threads, which abort a process that exits before them
    print("as one process")
