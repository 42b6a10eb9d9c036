"""What a worker finds before there is a plan: what decides the numbers, and what they cost."""

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
    """What decides the numbers beside the settings, found without a gradient.

    Attributes:
        layers: of the model.
        split_hashes: SHA-256 of each split's data, however it is cut into batches.
        source_hash: of the task's and the model's source.
        base_hash: of the model's own values where checkpoints are partial, else empty.
        first_hash: of the first checkpoint's bytes.
        device_kind: ``cpu`` or ``cuda``.
        device: the device in words.
        low_precision: layers that the first checkpoint stores in 16 bits or fewer.
        double_precision: layers that it stores in 64 bits.
        fixed_batches: whether batches are part of the loss, so that their size is never tuned.
        drawn: samples taken and samples in the data set, of each split that is not taken whole.
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
    """The splits as they were found at the first checkpoint, and what a gradient costs.

    Attributes:
        splits: with sizes, weights and first losses.
        seconds: of one full-batch gradient, by split.
        tuning: the batch size and memory format to plan with, and what they were chosen by.
        resident: whether the data of a split stay on the device, by split; else they are streamed.
        worker_bytes: memory of the worker with its data and the activations of a batch, but
            without what it needs for each element of the model.
        checkpoint_bytes: of the first checkpoint.
        read_seconds: to read it.
        fisher_seconds: of the Fisher information of all splits at a step, where it is asked for.
    """

    splits: tuple[SplitPlan, ...]
    seconds: dict[str, float]
    tuning: Tuning
    resident: dict[str, bool]
    worker_bytes: int
    checkpoint_bytes: int
    read_seconds: float
    fisher_seconds: float = 0.0


def split_plan(split: SplitData, found: Evaluation) -> SplitPlan:
    """How a split is evaluated, by its evaluation at the first checkpoint."""
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
        split: what was evaluated.
        first: without a gradient.
        second: with one.
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
