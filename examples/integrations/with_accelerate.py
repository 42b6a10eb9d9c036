"""Train a small net with Accelerate, on one process or several, and record its updates.

python with_accelerate.py      (or: accelerate launch --num_processes 2 --cpu with_accelerate.py)
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcray.integrations.accelerate import recorder


def main():
    """Train on this process's share of every batch."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = TensorDataset(x, x.argmax(1))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, batches = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.3), DataLoader(data, 8)
    )
    with recorder(accelerator, model, "trained/run", optimizer=optimizer):
        for images, labels in batches:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()  # every other time: the recorder counts updates
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
