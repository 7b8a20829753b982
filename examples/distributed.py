"""Training on several processes with fused_lstm.LSTM, by DistributedDataParallel or by FSDP2.

    python examples/distributed.py                                                      # one process
    torchrun --standalone --nproc-per-node 2 examples/distributed.py                    # each on half of every batch
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --strategy fsdp    # and with half of the weights

A model learns to forecast sums of two sine waves of unknown frequencies. However many processes share the work, the printed
losses are the same up to rounding. Runs on CUDA devices if there is one for each process, else on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_lstm


class Forecaster(nn.Module):
    """Samples (T, B, 1) to the mean squared error of forecasts, each of the sample after those seen."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = fused_lstm.LSTM(1, hidden, num_layers=2)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.lstm(x[:-1])[0]) - x[1:]).square().mean()


def waves(T: int, B: int, seed: int) -> Tensor:
    """(T, B, 1): a batch of sequences, the same in every process."""
    draw = torch.Generator().manual_seed(seed)
    frequency, phase = 0.1 + 0.5 * torch.rand(B, 2, generator=draw), 6.3 * torch.rand(B, 2, generator=draw)
    return (frequency * torch.arange(T)[:, None, None] + phase).sin().mean(2, keepdim=True)


def distribute(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    if not dist.is_initialized():
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model.lstm, mesh=mesh)  # its weights are gathered while it runs, and only then
    return fully_shard(model, mesh=mesh)


def train(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    torch.manual_seed(args.seed)  # the same weights in every process
    model = distribute(Forecaster(args.hidden).to(device), args.strategy, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        batch = waves(args.length, args.batch, args.seed + step).to(device)
        loss = model(batch.chunk(world, dim=1)[rank])
        optimizer.zero_grad()
        loss.backward()  # both strategies average the gradients over the processes: as of the whole batch
        optimizer.step()
        total = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        if rank == 0:
            print(f"step {step} loss {total.item() / world:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--strategy", choices=["ddp", "fsdp"], default="ddp", help="where torchrun started several processes")
    add("--hidden", type=int, default=64)
    add("--batch", type=int, default=32, help="sequences in a step, of all processes together")
    add("--length", type=int, default=50, help="of a sequence")
    add("--steps", type=int, default=100)
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
    if args.batch % world:
        parser.error(f"--batch: expected a multiple of the {world} processes, got {args.batch}")
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.device_count() >= here else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device, rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # FSDP2's reference cycles hold gloo's threads, which abort a process that exits before them


if __name__ == "__main__":
    main()
