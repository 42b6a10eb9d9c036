"""CIFAR AllCNN of the paper (All-CNN-C of Springenberg et al. 2014, arXiv 1412.6806).

Run:  python examples/paper/allcnn.py --scale small --out paper
"""

from __future__ import annotations

import torch.nn.functional as F
from common import CIFAR10, Network, Scale, main, task_of
from torch import Tensor, nn

# Channels, kernel, stride and padding of each convolution.
LAYERS = (
    (96, 3, 1, 1),
    (96, 3, 1, 1),
    (96, 3, 2, 1),
    (192, 3, 1, 1),
    (192, 3, 1, 1),
    (192, 3, 2, 1),
    (192, 3, 1, 0),
    (192, 1, 1, 0),
    (10, 1, 1, 0),
)
DROPOUT = {0: 0.2, 3: 0.5, 6: 0.5}  # before the convolution of this number


class AllCNN(nn.Module):
    """Nine convolutions, the last of which gives the classes, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        before = 3
        for number, (channels, kernel, stride, padding) in enumerate(LAYERS, 1):
            conv = nn.Conv2d(before, channels, kernel, stride, padding)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
            self.add_module(f"conv{number}", conv)
            before = channels

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 3, 32, 32]."""
        features = images
        for number, conv in enumerate(self.children()):
            if number in DROPOUT:
                features = F.dropout(features, DROPOUT[number], self.training)
            features = conv(features)
            if number + 1 < len(LAYERS):
                features = F.relu(features)
        return features.mean(dim=(2, 3))


NETWORK = Network(
    name="allcnn",
    title="CIFAR AllCNN",
    model=AllCNN,
    data=CIFAR10,
    scales={
        "tiny": Scale(6, 4, 2, 3, adam=False, fisher=4, fisher_times=1),
        "small": Scale(250, 50, 60, 50, adam=False, fisher=64, fisher_times=3),
        "full": Scale(50_000, 10_000, 1_000, 128, 10, fisher=512),
    },
    rate=0.01,
    analysis={"batch_size": 25},
)
tiny, small, full = (task_of(NETWORK, scale) for scale in ("tiny", "small", "full"))

if __name__ == "__main__":
    main(NETWORK, __doc__)
