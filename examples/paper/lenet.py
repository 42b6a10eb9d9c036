"""MNIST-LeNet of the paper: conv5-20, conv5-40, fc400, fc10, with dropout in training.

Run:  python examples/paper/lenet.py --scale small --out paper
"""

from __future__ import annotations

import torch.nn.functional as F
from common import MNIST, Network, Scale, main, task_of
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5x5 convolutions, each pooled to half the size, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 40, 5)
        self.fc1 = nn.Linear(40 * 4 * 4, 400)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(400, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        return self.fc2(self.dropout(F.relu(self.fc1(features.flatten(1)))))


NETWORK = Network(
    name="lenet",
    title="MNIST-LeNet",
    model=LeNet,
    data=MNIST,
    scales={
        "tiny": Scale(30, 20, 6, 10, fisher=8, fisher_times=2),
        "small": Scale(500, 200, 100, 100, fisher=128),
        "full": Scale(60_000, 10_000, 1_000, 250, 10, fisher=1_024),
    },
    rate=0.05,
    analysis={"batch_size": 125},
)
tiny, small, full = (task_of(NETWORK, scale) for scale in ("tiny", "small", "full"))

if __name__ == "__main__":
    main(NETWORK, __doc__)
