"""Train a small net on two processes, with DDP or (--shard) FSDP, and record it.

torchrun --nproc-per-node 2 distributed.py
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lcray


def main():
    """Train on this process's share of every batch."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x.argmax(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    model = fully_shard(model) if "--shard" in sys.argv else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with lcray.Recorder(model, "trained/run") as recorder:  # on every process; rank 0 writes
        for step in range(4):
            mine = slice(16 * step + 8 * dist.get_rank(), 16 * step + 8 * dist.get_rank() + 8)
            optimizer.zero_grad()
            F.cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()
            recorder.step()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # once the model is gone: DDP holds on to the group
