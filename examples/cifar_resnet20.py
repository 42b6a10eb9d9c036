"""CIFAR-10 with ResNet-20 (BatchNorm) and SGD with momentum, without augmentation.

Train and record:  python examples/cifar_resnet20.py --run runs/resnet20
Allocate:          lcray analyze runs/resnet20 --task examples/cifar_resnet20.py:task --out out/r20

The network is that of He et al. 2016 (arXiv 1512.03385, section 4.2), with their option A: where a
stage halves the image and doubles the channels, the shortcut takes every second pixel and pads the
new channels with zeros. It is what the paper uses on CIFAR, and it has no parameters, so that
every layer in the tables is one of the network's 20.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import CIFAR10, arguments, load_images, minibatches
from torch import Tensor, nn

from lcray import Recorder, Task

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.1, 0.9, 1e-4

Batch = tuple[Tensor, Tensor]  # images [n, 3, 32, 32], classes [n]


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut without parameters (option A)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before  # 2 if the channels double, else 1
        self.new_channels = after - before
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
    """One convolution, three stages of three blocks, one linear layer; 269,722 parameters."""

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
        features = self.stage3(self.stage2(self.stage1(features)))  # [n, 64, 8, 8]
        return self.fc(features.mean(dim=(2, 3)))


def splits() -> dict[str, Batch]:
    """The 10,000 training and 2,000 test images, or fewer: see ``LCRAY_SAMPLES`` in data.py."""
    return load_images(CIFAR10)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every image, [n], in nats; weight decay is not part of it."""
    images, classes = batch
    return F.cross_entropy(model(images), classes, reduction="none")


def groups(batch: Batch) -> Tensor:
    """The class of every image, [n]."""
    return batch[1]


task = Task(model=ResNet20, splits=splits, loss=loss, groups=groups)


def main() -> None:
    """Train for a number of steps, one checkpoint per step."""
    options = arguments(__doc__, run="runs/resnet20", needs=CIFAR10)
    torch.manual_seed(options.seed)
    model = ResNet20()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    batches = minibatches(splits()["train"], size=BATCH, steps=options.steps, seed=options.seed)
    with Recorder(model, options.run, task=f"{__file__}:task") as recorder:
        for step, batch in enumerate(batches, start=1):
            optimizer.zero_grad()
            mean_loss = loss(model, batch).mean()
            mean_loss.backward()
            optimizer.step()
            recorder.step()
            if step % 20 == 0:
                print(f"step {step}: mini-batch loss {mean_loss.item():.4f}")


if __name__ == "__main__":
    main()
