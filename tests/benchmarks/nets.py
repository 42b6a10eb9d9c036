"""The four networks, each with the evaluation it is measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .suite import Bench

STEPS, QUICK_STEPS = 50, 4  # of the recorded runs, at least
TASKS = Path(__file__).with_name("tasks.py")


@dataclass(frozen=True)
class Net:
    """A network and how its gradients are taken.

    Attributes:
        name: of the case.
        script: of the example, without ``.py``.
        samples: of the training split.
        intervals: that a worker has in a round.
        hardest: what most of its arithmetic is, ``sgemm`` or ``conv``.
        naive_batch: samples a batch of the naive loop.
        options: fields of `Settings`.
    """

    name: str
    script: str
    samples: int
    intervals: int
    hardest: str
    naive_batch: int = 256
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The reference of its task."""
        return f"{TASKS}:{self.script}_task"

    def environment(self, samples: int) -> dict[str, str]:
        """What makes the example take that many samples."""
        return {"LCRAY_SAMPLES": str(samples)}

    def run(self, bench: Bench) -> str:
        """Its recorded run."""
        return str(
            bench.example_run(self.script, bench.pick(max(STEPS, 2 * self.intervals), QUICK_STEPS))
        )


def _batch_statistics(size: int) -> dict[str, Any]:
    """Where batches are part of the loss, both sides take the same."""
    return {"batch_norm": "batch", "batch_size": size}


FC = Net("mnist-fc", "mnist_fc", 8000, 100, "sgemm")
LENET = Net("mnist-lenet", "mnist_lenet", 8000, 4, "conv")
RESNET = Net("cifar-resnet20-256", "cifar_resnet20", 2048, 1, "conv", 256, _batch_statistics(256))
RESNET_2000 = Net(
    "cifar-resnet20-2000", "cifar_resnet20", 2000, 1, "conv", 2000, _batch_statistics(2000)
)
GPT = Net("char-gpt", "char_gpt", 256, 12, "sgemm")
#: Spans of the fully connected network are as long as in an analysis of 200 steps; the others
#: are shorter, so that a round takes less than a minute.
NETS = (FC, LENET, RESNET, RESNET_2000, GPT)
