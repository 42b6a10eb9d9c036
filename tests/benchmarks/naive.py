"""What lcray is compared with: the loop that a user would write, untuned, on two threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lcray.tasks.task import load_task

from .peaks import peak_bytes

State = dict[str, Tensor]


def gradient(
    model: nn.Module, loss: Callable[..., Tensor], loader: Iterable[list[Tensor]], state: State
) -> State:
    """The gradient of the mean loss at `state`."""
    model.load_state_dict(state, strict=False)  # tied tensors are stored once
    model.zero_grad()
    n_items = 0
    for batch in loader:
        losses = loss(model, batch)
        losses.sum().backward()
        n_items += len(losses)
    return {name: p.grad / n_items for name, p in model.named_parameters() if p.grad is not None}


def allocate(
    model: nn.Module,
    loss: Callable[..., Tensor],
    loader: Iterable[list[Tensor]],
    files: Sequence[Path],
) -> Iterator[State]:
    """LC of each interval by Simpson's rule; the gradient at a shared endpoint is computed once."""
    start = load_file(files[0])
    left = gradient(model, loss, loader, start)
    for file in files[1:]:
        end = load_file(file)
        middle = {name: (start[name] + end[name]) / 2 for name in start}
        centre = gradient(model, loss, loader, middle)
        right = gradient(model, loss, loader, end)
        yield {
            name: (end[name] - start[name]) * (left[name] + 4 * centre[name] + right[name]) / 6
            for name in left
        }
        start, left = end, right


class Naive:
    """A player: `intervals` intervals of a run a round."""

    def __init__(
        self, task: str, run: str, intervals: int, batch_size: int, batch_statistics: bool
    ) -> None:
        torch.set_num_threads(2)
        found = load_task(task)
        assert callable(found.splits)
        self._model, self._loss = found.model().train(batch_statistics), found.loss
        data = TensorDataset(*found.splits()["train"])
        self._loader = DataLoader(data, batch_size=batch_size)
        self._files = sorted(Path(run).glob("step-*.safetensors"))[: intervals + 1]

    def round(self) -> dict[str, float]:
        """Gradients and seconds."""
        begin = time.perf_counter()
        for _ in allocate(self._model, self._loss, self._loader, self._files):
            pass
        seconds = time.perf_counter() - begin
        return {
            "gradients": 2 * len(self._files) - 1,
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
        }
