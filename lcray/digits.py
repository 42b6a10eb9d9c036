"""The demo: scikit-learn's handwritten digits, a LeNet-like network and SGD with momentum.

`task` is what a user would write; `train_demo` is a user's training loop.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray.checkpoints import Recorder
from lcray.errors import OutputError, UsageError
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.analyze import analyze
from lcray.execution.driver.progress import OnProgress
from lcray.tables.reading.results import Results
from lcray.tasks.task import Task

BATCH, LEARNING_RATE, MOMENTUM = 128, 0.03, 0.9
MEAN, STANDARD_DEVIATION = 0.305, 0.376  # of all pixels, scaled to [0, 1]
EVALUATION_BATCH = 256
N_TEST = 360  # of 1,797 digits; 1,437 are for training

Batch = tuple[Tensor, Tensor]  # images [n, 1, 8, 8], normalised; classes [n]


class DigitNet(nn.Module):
    """Two 3x3 convolutions, each followed by pooling, and two linear layers; 13,706 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 8, 8]."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [n, 16, 4, 4]
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)  # [n, 32, 2, 2]
        logits: Tensor = self.fc2(F.relu(self.fc1(features.flatten(1))))
        return logits


def digits() -> dict[str, Batch]:
    """The 1,797 digits, split by a fixed permutation into ``train`` (1,437) and ``test`` (360).

    Raises:
        UsageError: if scikit-learn is not installed.
    """
    table = np.loadtxt(_file(), delimiter=",")
    pixels, classes = table[:, :-1], table[:, -1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(classes))
    pixels = (pixels[order] / 16 - MEAN) / STANDARD_DEVIATION
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(classes[order]).long()
    return {
        "train": (images[:-N_TEST], labels[:-N_TEST]),
        "test": (images[-N_TEST:], labels[-N_TEST:]),
    }


def _file() -> Path:
    """The digits that come with scikit-learn, read without the seconds that importing it takes."""
    try:
        found = find_spec("sklearn")
    except ValueError:  # a module of that name that no file is behind
        found = None
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return file
    raise UsageError(
        "the demo's digits come with scikit-learn, which is missing: pip install 'lcray[demo]'"
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every digit, [n], in nats."""
    images, classes = batch
    return F.cross_entropy(model(images), classes, reduction="none")


def groups(batch: Batch) -> Tensor:
    """The class of every digit, [n]."""
    return batch[1]


task = Task(model=DigitNet, splits=digits, loss=loss, groups=groups)


def train_demo(run: Path, *, steps: int = 100, seed: int = 0) -> None:
    """Train `task`'s network on mini-batches and record one checkpoint per step.

    Args:
        run: the directory to write the checkpoints into.
        steps: the number of optimizer steps.
        seed: of the initial weights and the mini-batches; torch's generator is left unchanged.

    Raises:
        UsageError: if scikit-learn is not installed.
        RecorderError: if a checkpoint cannot be written.
    """
    images, classes = digits()["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitNet()
    generator = torch.Generator().manual_seed(seed)
    # By hand: making an optimizer of torch imports its compiler, which takes longer than training.
    momentum = [torch.zeros_like(parameter) for parameter in model.parameters()]
    rows = torch.empty(0, dtype=torch.long)
    with Recorder(model, run, task="lcray.digits:task") as recorder:
        for _ in range(steps):
            if len(rows) < BATCH:  # a new epoch; the rest of the old one comes first
                rows = torch.cat((rows, torch.randperm(len(classes), generator=generator)))
            chosen, rows = rows[:BATCH], rows[BATCH:]
            mean = loss(model, (images[chosen], classes[chosen])).mean()
            gradients = torch.autograd.grad(mean, list(model.parameters()))
            with torch.no_grad():
                for parameter, velocity, gradient in zip(
                    model.parameters(), momentum, gradients, strict=True
                ):
                    velocity.mul_(MOMENTUM).add_(gradient)
                    parameter.add_(velocity, alpha=-LEARNING_RATE)
            recorder.step()


def demo(
    directory: Path, *, workers: int | None = None, on_progress: OnProgress | None = None
) -> Results:
    """Train, record and analyze: ``directory/run`` and ``directory/out``.

    A run that exists is analyzed as it is, and an unfinished analysis is resumed. Without `workers`
    this process does the work, without Ray.

    Raises:
        UsageError: if scikit-learn is not installed.
        OutputError: if `directory` holds something else, or cannot be written.
    """
    run = directory / "run"
    if not run.exists():
        if directory.exists() and any(directory.iterdir()):
            raise OutputError(f"{directory}: not empty; choose another --dir")
        train_demo(run)
    return analyze(
        run,
        "lcray.digits:task",
        directory / "out",
        resources=Resources(workers=workers, local=workers is None),
        on_progress=on_progress,
        batch_size=EVALUATION_BATCH,  # not measured, so that everybody sees the same numbers
        memory_format="contiguous",
    )
