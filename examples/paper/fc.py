"""MNIST-FC of the paper, 784-100-50-10: plain runs over seeds, and the paired ones.

Run:  python examples/paper/fc.py --scale small --out paper
"""

from __future__ import annotations

import torch.nn.functional as F
from common import MNIST, Network, Scale, main, task_of
from torch import Tensor, nn


class FullyConnected(nn.Module):
    """Three fully connected layers with ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 100)
        self.fc2 = nn.Linear(100, 50)
        self.fc3 = nn.Linear(50, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        hidden = F.relu(self.fc1(images.flatten(1)))
        return self.fc3(F.relu(self.fc2(hidden)))


MOMENTA = (0.0, 0.5, 0.8, 0.95, 0.99)  # of the last layer; the plain runs have 0.9
NETWORK = Network(
    name="fc",
    title="MNIST-FC",
    model=FullyConnected,
    data=MNIST,
    scales={
        "tiny": Scale(60, 30, 12, 20, 2, (0.0,), 1, fisher=16, fisher_times=3),
        "small": Scale(1_000, 250, 120, 100, 6, MOMENTA, 3, fisher=256),
        "full": Scale(60_000, 10_000, 1_000, 250, 10, MOMENTA, 10, fisher=1_024),
    },
    rate=0.05,
    paired=True,
    analysis={"batch_size": 500, "memory_format": "contiguous"},
)
tiny, small, full = (task_of(NETWORK, scale) for scale in ("tiny", "small", "full"))

if __name__ == "__main__":
    main(NETWORK, __doc__)
