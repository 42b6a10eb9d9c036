"""Fisher information of every layer: the trace of its block, true and empirical.

Legend: S samples, M trained layers, P parameters of a layer.

    trace = Σ_s |G_s|² / Σ_s W_s,    G_s = Σ_i √w_i ∂ℓ_i/∂θ,    W_s = Σ_i w_i

over the items i of each sample s. If a sample has one item, this is the mean over items of the
squared norm of their score. If a sample has several items (tokens), it is the information of the
whole sample per unit of weight. Under targets that the model draws, the items of a sample do not
correlate, so this is again the mean over items. The *empirical* trace takes the data's targets; the
*true* trace draws them from the model: E_x E_{y ~ p(y|x, θ)} |∂ log p(y|x, θ)/∂θ|² (Kunstner et al.
2019, arXiv 1905.12558, on the difference; Achille et al. 2017, arXiv 1711.08856, use its trace).

Standard errors are those of a ratio of means over independent samples (Cochran 1977, section 2.11):

    se² = S/(S − 1) · Σ_s (|G_s|² − trace · W_s)² / (Σ_s W_s)²

for the distribution that the samples come from, even if all samples of a split are used.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcray.allocation.fisher.per_sample import BatchScores, SampleScores
from lcray.allocation.gradient import GradientEngine
from lcray.allocation.path import Point, Segment
from lcray.errors import TaskError, brief
from lcray.settings import Settings
from lcray.tasks.data.pytree import map_tensors
from lcray.tasks.data.split import SplitData
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.task import Task

Floats = NDArray[np.float64]


@dataclass
class _Sums:
    """The samples of one split at one step, true or empirical."""

    squares: list[Floats] = field(default_factory=list)  # [B, M] per batch
    weights: list[Floats] = field(default_factory=list)  # [B] per batch
    n_items: int = 0

    def add(self, scores: BatchScores) -> None:
        self.squares.append(scores.squares.numpy())
        self.weights.append(scores.weights.numpy())
        self.n_items += scores.n_items

    def ratio(self) -> tuple[Floats, Floats]:
        """The traces and their standard errors, [M] each."""
        return ratio_of_means(np.concatenate(self.squares), np.concatenate(self.weights))


def ratio_of_means(squares: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Σ squares / Σ weights, and its standard error.

    Args:
        squares: for each sample and layer, [S, M].
        weights: for each sample, [S].

    Returns:
        [M] and [M]; NaN if undefined: without weight, or for the error from a single sample.
    """
    total, n = weights.sum(), len(weights)
    if not total > 0:
        return (np.full(squares.shape[1], math.nan),) * 2
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged run is not finite
        ratio = squares.sum(0) / total
        rest = ((squares - ratio * weights[:, None]) ** 2).sum(0)
        error = np.sqrt(rest * n / (n - 1)) / total if n > 1 else np.full_like(ratio, math.nan)
    return ratio, error


@dataclass(frozen=True)
class Traces:
    """The Fisher information of a split at a step.

    Attributes:
        numbers: of the layers, [M].
        n_items: number of items with weight.
        empirical: trace and standard error, [M] each.
        true: the same for the true one; None if it was not asked for.
    """

    numbers: tuple[int, ...]
    n_items: int
    empirical: tuple[Floats, Floats]
    true: tuple[Floats, Floats] | None

    def same_as(self, other: Traces) -> bool:
        """Whether all numbers are the same; NaN is NaN."""
        mine, others = (np.stack([*t.empirical, *(t.true or ())]) for t in (self, other))
        return np.array_equal(mine, others, equal_nan=True)


class FisherMeter:
    """Measures Fisher information at checkpoints.

    Args:
        flat: the model; its point is moved.
        engine: gives the checked losses of a batch.
        task: with `sample_targets`, unless the settings leave out the true Fisher information.
        settings: of the analysis.
        splits: the samples of each split to use.
        first: a point of the run, which gives the values of frozen layers.

    Raises:
        TaskError: if the task does not allow it.
    """

    def __init__(
        self,
        flat: FlatModel,
        engine: GradientEngine,
        task: Task,
        settings: Settings,
        splits: tuple[SplitData, ...],
        first: Point,
    ) -> None:
        check_task(task, settings)
        self._flat, self._task, self._settings, self._splits = flat, task, settings, splits
        self._go_to(first)
        self._scores = SampleScores(flat, engine, task.loss, splits[0])

    def measure(self, split: SplitData, point: Point) -> Traces:
        """Fisher information at a checkpoint.

        Raises:
            TaskError: if the task's loss or `sample_targets` fails or breaks its contract.
        """
        self._go_to(point)
        true = self._settings.fisher_kind == "both"
        generator = torch.Generator(self._flat.theta.device)
        seed = [self._settings.fisher_seed, zlib.crc32(split.name.encode()), point.step]
        generator.manual_seed(int(np.random.default_rng(seed).integers(1 << 62)))
        sums, drawn = _Sums(), _Sums()
        for index, batch in enumerate(split.batches):
            scores = self._scores.of_batch(split, index, batch)
            sums.add(scores)
            if true:
                targets = self._sample(split.name, scores.output, batch, generator)
                drawn.add(self._scores.of_batch(split, index, targets))
        return Traces(
            self._scores.numbers, sums.n_items, sums.ratio(), drawn.ratio() if true else None
        )

    def rows(
        self, read: Callable[[int], Point], steps: list[int], alive: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        """Columns of `fisher` for some steps, without the split; by split.

        Args:
            read: gives the checkpoint of a step.
            steps: in order, at least one.
            alive: called from time to time.
        """
        found: dict[str, list[Traces]] = {split.name: [] for split in self._splits}
        for step in steps:
            point = read(step)
            for split in self._splits:
                found[split.name].append(self.measure(split, point))
                alive()
        return {name: self._columns(steps, traces) for name, traces in found.items()}

    def _columns(self, steps: list[int], found: list[Traces]) -> dict[str, Any]:
        numbers = np.array(self._scores.numbers, np.int32)
        unknown = np.full(len(numbers), math.nan), np.full(len(numbers), math.nan)
        true = [traces.true or unknown for traces in found]
        names = [layer.name for layer in self._flat.layers]
        return {
            "step": np.repeat(steps, len(numbers)),
            "layer": (np.tile(numbers, len(steps)), names),
            "trace_true": np.concatenate([trace for trace, _ in true]),
            "trace_true_se": np.concatenate([error for _, error in true]),
            "trace_empirical": np.concatenate([traces.empirical[0] for traces in found]),
            "trace_empirical_se": np.concatenate([traces.empirical[1] for traces in found]),
            "n_items": np.repeat([traces.n_items for traces in found], len(numbers)),
            "seed": np.full(len(numbers) * len(steps), self._settings.fisher_seed),
        }

    def _go_to(self, point: Point) -> None:
        self._flat.differentiate_buffers(frozenset())
        Segment(point, point).set_point(self._flat, 0.0)

    def _sample(self, split: str, output: Any, batch: Any, generator: torch.Generator) -> Any:
        assert self._task.sample_targets is not None
        where = f"task sample_targets on split {split!r}"
        if output is None:
            raise TaskError(
                f"{where}: needs the model's output, but the loss does not call the model exactly "
                "once; change the loss, or leave the true trace out (--fisher-kind empirical)"
            )
        try:
            with torch.no_grad():
                # A copy: the batch is used again at the next step.
                copy = map_tensors(torch.clone, batch)
                return self._task.sample_targets(output, copy, generator)
        except Exception as error:
            raise TaskError(f"{where}: failed: {brief(error)}") from error


def check_task(task: Task, settings: Settings) -> None:
    """Refuse a task without `sample_targets` if the true Fisher information is asked for.

    Raises:
        TaskError: saying what to do.
    """
    if settings.fisher_kind == "both" and task.sample_targets is None:
        raise TaskError(
            "task: the true Fisher information needs sample_targets, which draws targets from the "
            "model's output; add it to the task, or leave it out with --fisher-kind empirical"
        )
