"""MNIST with a fully connected network, 784-100-50-10, and SGD with momentum.

Train and record:  python examples/mnist_fc.py --run runs/fc
Allocate:          lcray analyze runs/fc --task examples/mnist_fc.py:task --out out/fc
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import MNIST, arguments, load_images, minibatches
from torch import Tensor, nn

from lcray import Recorder, Task

BATCH, LEARNING_RATE, MOMENTUM = 250, 0.05, 0.9

Batch = tuple[Tensor, Tensor]  # images [n, 1, 28, 28], classes [n]


class FullyConnected(nn.Module):
    """Three fully connected layers with ReLU between them; 84,060 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 100)
        self.fc2 = nn.Linear(100, 50)
        self.fc3 = nn.Linear(50, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        hidden = F.relu(self.fc1(images.flatten(1)))
        return self.fc3(F.relu(self.fc2(hidden)))


def splits() -> dict[str, Batch]:
    """The 8,000 training and 2,000 test digits."""
    return load_images(MNIST)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every digit, [n], in nats."""
    images, classes = batch
    return F.cross_entropy(model(images), classes, reduction="none")


def groups(batch: Batch) -> Tensor:
    """The class of every digit, [n]."""
    return batch[1]


task = Task(model=FullyConnected, splits=splits, loss=loss, groups=groups)


def main() -> None:
    """Train for a number of steps, one checkpoint per step."""
    options = arguments(__doc__, run="runs/fc", needs=MNIST)
    torch.manual_seed(options.seed)
    model = FullyConnected()
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
