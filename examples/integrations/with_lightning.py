"""Train a small net with Lightning that records, and name the task.

python with_lightning.py && lcray analyze trained/run --task with_lightning:task --out trained/out
"""

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcray import Task
from lcray.integrations.lightning import RecorderCallback


def build():
    """The net."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def splits():
    """The data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    return {"train": (x[:64], y[:64]), "val": (x[64:], y[64:])}


def loss(model, batch):
    """One loss per item."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


task = Task(build, splits, loss, groups=lambda batch: batch[1])


class Net(lightning.LightningModule):
    """Trains the net."""

    def __init__(self):
        super().__init__()
        self.model = build()

    def training_step(self, batch, number):
        """The mean loss of a batch."""
        return loss(self.model, batch).mean()

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.3)


if __name__ == "__main__":
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[RecorderCallback("trained/run", module="model")],
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(TensorDataset(*splits()["train"]), 16))
