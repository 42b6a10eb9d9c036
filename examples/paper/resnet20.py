"""CIFAR ResNet-20 of the paper (He et al. 2016, arXiv 1512.03385, option A shortcuts).

Run:  python examples/paper/resnet20.py --scale small --out paper

BatchNorm takes the statistics of the evaluation batch, as the paper's does; there is no Fisher
information then, since no image has a loss of its own.
"""

from __future__ import annotations

import torch.nn.functional as F
from common import CIFAR10, Network, Scale, main, task_of
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut without parameters."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.new_channels = after // before, after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, features: Tensor) -> Tensor:
        """[n, before, h, w] to [n, after, h / stride, w / stride]."""
        shortcut = features
        if self.new_channels:
            half = self.new_channels // 2
            shortcut = features[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, half, half))
        hidden = F.relu(self.bn1(self.conv1(features)))
        return F.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet20(nn.Module):
    """One convolution, three stages of three blocks, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.stage2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.stage3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.fc = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 3, 32, 32]."""
        features = F.relu(self.bn(self.conv(images)))
        features = self.stage3(self.stage2(self.stage1(features)))
        return self.fc(features.mean(dim=(2, 3)))


NETWORK = Network(
    name="resnet20",
    title="CIFAR ResNet-20",
    model=ResNet20,
    data=CIFAR10,
    scales={
        "tiny": Scale(20, 10, 3, 10),
        "small": Scale(250, 50, 60, 50),
        "full": Scale(50_000, 10_000, 1_000, 128, 10),
    },
    rate=0.1,
    analysis={"batch_size": 125, "batch_norm": "batch"},
)
tiny, small, full = (task_of(NETWORK, scale) for scale in ("tiny", "small", "full"))

if __name__ == "__main__":
    main(NETWORK, __doc__)
