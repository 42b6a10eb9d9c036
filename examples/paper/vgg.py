"""CIFAR VGG-half of the paper: VGG-11 with half the channels, without its last stage.

Run:  python examples/paper/vgg.py --scale small --out paper
"""

from __future__ import annotations

import torch.nn.functional as F
from common import CIFAR10, Network, Scale, main, task_of
from torch import Tensor, nn

STAGES = ((32,), (64,), (128, 128), (256, 256))  # channels; images are halved after each


class VGGHalf(nn.Module):
    """Six convolutions in four stages, and three layers of 512, 512 and 10."""

    def __init__(self) -> None:
        super().__init__()
        before, number = 3, 0
        for stage in STAGES:
            for channels in stage:
                number += 1
                self.add_module(f"conv{number}", nn.Conv2d(before, channels, 3, padding=1))
                before = channels
        self.fc1 = nn.Linear(256 * 2 * 2, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 3, 32, 32]."""
        features, number = images, 0
        for stage in STAGES:
            for _ in stage:
                number += 1
                features = F.relu(self.get_submodule(f"conv{number}")(features))
            features = F.max_pool2d(features, 2)
        hidden = F.relu(self.fc2(F.relu(self.fc1(features.flatten(1)))))
        return self.fc3(hidden)


NETWORK = Network(
    name="vgg",
    title="CIFAR VGG-half",
    model=VGGHalf,
    data=CIFAR10,
    scales={
        "tiny": Scale(10, 6, 2, 5, adam=False, fisher=4, fisher_times=1),
        "small": Scale(250, 50, 60, 50, fisher=64, fisher_times=3),
        "full": Scale(50_000, 10_000, 1_000, 128, 10, fisher=512),
    },
    rate=0.01,
    analysis={"batch_size": 50},
)
tiny, small, full = (task_of(NETWORK, scale) for scale in ("tiny", "small", "full"))

if __name__ == "__main__":
    main(NETWORK, __doc__)
