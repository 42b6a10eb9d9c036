"""MNIST with a LeNet (two convolutions, two fully connected layers) and SGD with momentum.

Train and record:  python examples/mnist_lenet.py --run runs/lenet
Allocate:          lcray analyze runs/lenet --task examples/mnist_lenet.py:task --out out/lenet
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import MNIST, arguments, load_images, minibatches
from torch import Tensor, nn

from lcray import Recorder, Task

BATCH, LEARNING_RATE, MOMENTUM = 250, 0.02, 0.9

Batch = tuple[Tensor, Tensor]  # images [n, 1, 28, 28], classes [n]


class LeNet(nn.Module):
    """Two 5x5 convolutions, each pooled to half the size, and two layers; 280,970 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 40, 5)
        self.fc1 = nn.Linear(40 * 4 * 4, 400)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(400, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [n, 20, 12, 12]
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)  # [n, 40, 4, 4]
        hidden = self.dropout(F.relu(self.fc1(features.flatten(1))))
        return self.fc2(hidden)


def splits() -> dict[str, Batch]:
    """The 8,000 training and 2,000 test digits."""
    return load_images(MNIST)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every digit, [n], in nats; lcray evaluates it with dropout off."""
    images, classes = batch
    return F.cross_entropy(model(images), classes, reduction="none")


def groups(batch: Batch) -> Tensor:
    """The class of every digit, [n]."""
    return batch[1]


task = Task(model=LeNet, splits=splits, loss=loss, groups=groups)


def main() -> None:
    """Train for a number of steps, one checkpoint per step."""
    options = arguments(__doc__, run="runs/lenet", needs=MNIST)
    torch.manual_seed(options.seed)
    model = LeNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
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
