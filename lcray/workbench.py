"""A task on a device: its model on flat storage, its data in batches, its gradient engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from lcray.data import SplitData, prepare_split
from lcray.errors import UsageError
from lcray.flat import FlatModel
from lcray.gradient import GradientEngine
from lcray.normalization import depends_on_batches
from lcray.planning import Settings
from lcray.task import Task, call_model, split_data

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Workbench:
    """A task's model and data, ready for gradients.

    Attributes:
        device: where it computes.
        flat: the model.
        engine: evaluates losses and gradients.
        splits: the data, in the task's order.

    Args:
        task: the task.
        settings: of the analysis.
        device: where to compute.
        threads: intra-op threads; None leaves torch as it is.

    Raises:
        TaskError: if model or data break the contract.
        UsageError: for a split that does not exist.
    """

    def __init__(
        self, task: Task, settings: Settings, *, device: str = "cpu", threads: int | None = None
    ) -> None:
        _configure_torch(threads, settings.deterministic, device)
        self.device = _open_device(device)
        self._dtype = DTYPES[settings.dtype]
        model = call_model(task)
        self.flat = FlatModel(model, self.device, self._dtype, partial=settings.partial)
        self.engine = GradientEngine(self.flat, task, settings.batch_norm)
        self.splits = tuple(self._prepare(task, settings))

    def _prepare(self, task: Task, settings: Settings) -> Iterator[SplitData]:
        fixed = depends_on_batches(self.flat.model, settings.batch_norm)
        for name, data in split_data(task, settings.splits).items():
            yield prepare_split(
                name,
                data,
                task,
                batch_size=settings.batch_size,
                fixed_seed=settings.batch_seed if fixed else None,
                place=self._place,
            )

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)


def _open_device(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch raises whatever the device's library does
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"device {device!r}: cannot be used: {reason}; try cpu") from error


def _configure_torch(threads: int | None, deterministic: bool, device: str) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu":
        # float32 means float32: TF32 keeps 10 bits, fewer than a loss difference can afford.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
