"""Trains the network and records a checkpoint a step: python mytrain.py --run /shared/runs/mine."""

import argparse
from pathlib import Path

import torch
from mynet import build
from mytask import loss, splits

import lcray


def main() -> None:
    """Train with SGD on batches of 100 images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder of checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = splits()["train"]
    with lcray.Recorder(model, options.run) as recorder:
        for step in range(options.steps):
            rows = torch.arange(100 * step, 100 * (step + 1)) % len(images)
            optimizer.zero_grad()
            loss(model, (images[rows], labels[rows])).mean().backward()
            optimizer.step()
            recorder.step()


if __name__ == "__main__":
    main()
