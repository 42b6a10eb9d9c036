"""What a worker finds before planning: the inputs that decide the numbers, and their cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lcray.allocation.sums import Evaluation
from lcray.errors import TaskError
from lcray.execution.worker.tuning import Tuning
from lcray.planning.plan import SplitPlan
from lcray.tasks.data.split import SplitData
from lcray.tasks.layer import Layer


@dataclass(frozen=True)
class Description:
    """The inputs that decide the numbers besides the settings, found without a gradient.

    Attributes:
        layers: layers of the model.
        split_hashes: SHA-256 of each split's data, however it is cut into batches.
        source_hash: hash of the task's and the model's source.
        base_hash: hash of the model's own values if checkpoints are partial, else empty.
        first_hash: hash of the first checkpoint's bytes.
        device_kind: ``cpu`` or ``cuda``.
        device: the device in words.
        low_precision: layers that the first checkpoint stores in 16 bits or fewer.
        double_precision: layers that it stores in 64 bits.
        fixed_batches: whether batches are part of the loss, so that their size is never tuned.
        drawn: samples taken and samples in the data set, for each split that is not taken whole.
        batch_loss: whether the task declares that batches are part of the loss.
    """

    layers: tuple[Layer, ...]
    split_hashes: dict[str, str]
    source_hash: str
    base_hash: str
    first_hash: str
    device_kind: str
    device: str
    low_precision: tuple[str, ...] = ()
    double_precision: tuple[str, ...] = ()
    fixed_batches: bool = False
    drawn: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    batch_loss: bool = False


@dataclass(frozen=True)
class Probe:
    """The splits at the first checkpoint, and the cost of a gradient.

    Attributes:
        splits: the splits with sizes, weights and first losses.
        seconds: duration of one full-batch gradient, by split.
        tuning: the batch size and memory format to plan with, and the rates that decided them.
        resident: whether the data stay on the device, by split; else they are streamed.
        worker_bytes: memory of the worker with its data and the activations of a batch, without
            the memory per element of the model.
        read_seconds: duration of reading it.
        fisher_seconds: duration of the Fisher information of all splits at a step; 0 if not asked
            for.
    """

    splits: tuple[SplitPlan, ...]
    seconds: dict[str, float]
    tuning: Tuning
    resident: dict[str, bool]
    worker_bytes: int
    read_seconds: float
    fisher_seconds: float = 0.0


def split_plan(split: SplitData, found: Evaluation) -> SplitPlan:
    """The plan of a split, from its evaluation at the first checkpoint."""
    return SplitPlan(
        name=split.name,
        n_samples=split.n_samples,
        n_items=found.n_items,
        total_weight=found.total_weight,
        first_loss=found.loss if math.isfinite(found.loss) else None,
        n_batches=len(split.batches),
        groups=split.groups,
        group_weights=found.group_weights,
        sorted_by_group=split.sorted_by_group,
        drawn_from=split.drawn_from,
        replicate_weights=found.replicate_weights,
    )


def check_repeatable(
    split: SplitData, first: Evaluation, second: Evaluation, same: bool, *, exact: bool
) -> None:
    """Refuse a loss that is not a function of the weights.

    Args:
        split: the split.
        first: its evaluation without a gradient.
        second: its evaluation with a gradient.
        same: whether a batch had the same gradient twice.
        exact: whether losses must be equal in every bit.

    Raises:
        TaskError: if the two evaluations differ.
    """
    same_weights = first.weight_marks == second.weight_marks
    if first.n_items != second.n_items or not same_weights:
        raise TaskError(
            f"task loss on split {split.name!r}: {first.n_items} items at first, then "
            f"{second.n_items}; their number and weights must not change"
        )
    close = abs(first.loss - second.loss) <= 1e-5 * abs(first.loss)
    finite = first.loss == first.loss
    if finite and not (same and first.loss == second.loss if exact else close):
        raise TaskError(
            f"task loss on split {split.name!r}: {first.loss!r} at first, then {second.loss!r} at "
            "the same weights; switch sampling, dropout by hand and augmentation off"
        )
