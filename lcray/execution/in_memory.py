"""Loss change allocation between two states in memory, without a run, Ray or files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, nn

from lcray.allocation.allocator import Accuracy, IntervalLC, SplitAllocator
from lcray.allocation.path import Point, Segment
from lcray.allocation.quadrature import get_rule
from lcray.allocation.sums import check_same
from lcray.checkpoints.naming import canonical_names
from lcray.errors import CheckpointError, UsageError
from lcray.execution.worker.fresh import check_model
from lcray.execution.worker.independence import Independence
from lcray.execution.worker.workbench import Share, Workbench
from lcray.planning.make import make_settings
from lcray.settings import Options, Settings
from lcray.tables.reading.confidence import Replication, columns
from lcray.tasks.data.split import SplitData
from lcray.tasks.layer import Layer
from lcray.tasks.model.precision import precision_kept
from lcray.tasks.task import Task, locate


@dataclass(frozen=True, repr=False)
class Allocation:
    """LC of one split between two states; all in units of the loss.

    Attributes:
        split: the split.
        loss_start: mean loss before.
        loss_end: mean loss after.
        elements: LC of each element, by layer, in the layer's shape, float64.
        groups: LC of each group's own mean loss, by group and layer; empty without groups.
        layer_error: |Σ_i (rule_i − embedded_i)| by layer; empty without an embedded rule.
        converged: whether |gap| met the tolerance; None for a rule that takes samples of batches.
        panels: final number of panels of the rule.
        replication: the drawn sample; None if all data were taken.
        replicates: loss change, LC and LC of each layer on each replicate, [2 + L, R] float64.
        notes: layers that move, but whose part of the change LC does not show; one line per kind.
    """

    split: str
    loss_start: float
    loss_end: float
    elements: dict[str, Tensor]
    groups: dict[int, dict[str, float]]
    layer_error: dict[str, float]
    converged: bool | None
    panels: int
    replication: Replication | None = None
    replicates: NDArray[Any] | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Allocation({self.split!r}, loss_change={self.loss_change:g}, lc={self.lc:g})"

    @property
    def loss_change(self) -> float:
        """The measured change of the loss."""
        return self.loss_end - self.loss_start

    @property
    def lc(self) -> float:
        """ΣLC."""
        return math.fsum(float(values.sum()) for values in self.elements.values())

    @property
    def gap(self) -> float:
        """The completeness gap: ΣLC minus the measured change of the loss."""
        return self.lc - self.loss_change

    def confidence(self, *, level: float = 0.95) -> pd.DataFrame:
        """Loss change and LC with the uncertainty from sampling the data.

        The columns are quantity (``loss_change``, ``lc``), layer (empty for all layers together),
        and estimate, se, low and high as in `lcray.tables.reading.confidence`.

        Args:
            level: level of confidence.

        Raises:
            UsageError: for a level that is not between 0 and 1.
        """
        lc = [float(values.sum()) for values in self.elements.values()]
        whole = [self.loss_change, self.lc, *lc]
        quantity = ["loss_change"] + ["lc"] * (1 + len(lc))
        names = {"quantity": quantity, "layer": ["", "", *self.elements]}
        found = columns(self.replication, whole, self.replicates, level)
        return pd.DataFrame({**names, **found})

    def layers(self) -> pd.DataFrame:
        """One row per layer: lc, lc_helping, lc_hurting, n_helping, n_hurting, n_zero."""
        rows = {
            name: {
                "lc": float(values.sum()),
                "lc_helping": float(values.clamp(max=0).sum()),
                "lc_hurting": float(values.clamp(min=0).sum()),
                "n_helping": int((values < 0).sum()),
                "n_hurting": int((values > 0).sum()),
                "n_zero": int((values == 0).sum()),
            }
            for name, values in self.elements.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


@precision_kept()
def allocate(
    task: Task | str,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    device: str = "cpu",
    **options: Unpack[Options],
) -> dict[str, Allocation]:
    """Allocate the loss change between two states of a model.

    Args:
        task: a `Task`, or ``package.module:attribute``.
        before: the state dict at the start of the path.
        after: the state dict at its end.
        device: where to compute.
        **options: fields of `Settings`: ``rule``, ``refine``, ``rtol``, ``batch_norm``, ``dtype``,
            ``splits`` …

    Returns:
        An `Allocation` for each split.

    Raises:
        TaskError: if the task breaks its contract.
        CheckpointError: if a state does not fit the model, or is not finite.
        UsageError: for an option that does not exist or cannot be used.
    """
    settings = make_settings(options)
    _check_states(before, after)
    loaded = locate(task).load()
    bench = Workbench(loaded, settings, share=Share(device))
    states = [_point(bench, state, step) for step, state in enumerate((before, after))]
    Independence(bench, loaded).check(states)
    segment = Segment(*states)
    notes: tuple[str, ...] = ()
    if segment.is_finite:
        notes = check_model(bench, loaded, states[0], states[1], states[1]).notes
    return {
        split.name: replace(_allocate(bench, settings, index, segment), notes=notes)
        for index, split in enumerate(bench.splits)
    }


def _check_states(before: Any, after: Any) -> None:
    for name, state in (("before", before), ("after", after)):
        if not isinstance(state, Mapping):
            raise UsageError(f"{name}: needs a state dict, not a {type(state).__name__}")
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise UsageError(f"{name}: {key!r} is a {type(value).__name__}, must be a tensor")
            if nn.parameter.is_lazy(value):
                raise UsageError(f"{name}: {key!r} has no shape yet; run one batch in model()")
    tensors = [after[name] for name in before if name in after and before[name].numel()]
    same = [before[name] for name in before if name in after and before[name].numel()]
    if same and all(a.data_ptr() == b.data_ptr() for a, b in zip(same, tensors, strict=True)):
        raise UsageError(
            "before and after are the same memory: a state dict follows its model; copy it first: "
            "{name: value.clone() for name, value in model.state_dict().items()}"
        )


def _point(bench: Workbench, state: Mapping[str, Tensor], step: int) -> Point:
    names = canonical_names(state)
    tensors = {names[key]: value.detach().cpu() for key, value in state.items()}
    vector, constants = bench.flat.flatten(tensors, step)
    return Point(step, vector.to(bench.device), constants)


def _allocate(bench: Workbench, settings: Settings, index: int, segment: Segment) -> Allocation:
    split = bench.splits[index]
    segment.set_point(bench.flat, 0.0)
    bench.engine.check_statistics(split)
    first = bench.engine.evaluate(split, None)
    bench.flat.check_unwritten(segment.start.vector)
    accuracy = Accuracy.of(settings, first.loss)
    allocator = SplitAllocator(bench.engine, split, get_rule(settings.rule), accuracy)
    result = allocator.advance(segment)
    if math.isfinite(result.loss_start):
        check_same(split.name, first.loss, result.loss_start, exact=settings.deterministic)
    if result.lc is None:
        raise CheckpointError(f"split {split.name!r}: no LC between the states: {result.status}")
    lc = result.lc.cpu()
    layers = bench.flat.layers
    replication = None
    if split.drawn_from is not None:
        replication = Replication(split.n_samples, split.drawn_from, first.replicate_weights)
    return Allocation(
        split=split.name,
        loss_start=result.loss_start,
        loss_end=result.loss_end,
        elements={
            layer.name: bench.flat.layout.shaped(lc, number).contiguous()
            for number, layer in enumerate(layers)
        },
        groups=_groups(split.groups, layers, result),
        layer_error=_by_layer(layers, result.layer_error),
        converged=result.converged,
        panels=result.panels,
        replication=replication,
        replicates=_replicates(split, result),
    )


def _replicates(split: SplitData, result: IntervalLC) -> NDArray[Any] | None:
    if split.drawn_from is None or result.group_lc is None:
        return None
    lc = result.group_lc[len(split.groups) :].T.cpu().numpy()
    before, after = np.array(result.replicate_losses)
    return np.vstack([after - before, lc.sum(axis=0), lc])


def _by_layer(layers: tuple[Layer, ...], values: Tensor | None) -> dict[str, float]:
    if values is None:
        return {}
    return dict(zip((layer.name for layer in layers), values.tolist(), strict=True))


def _groups(
    groups: tuple[int, ...], layers: tuple[Layer, ...], result: IntervalLC
) -> dict[int, dict[str, float]]:
    if result.group_lc is None:
        return {}
    rows = result.group_lc[: len(groups)]
    return {g: _by_layer(layers, row) for g, row in zip(groups, rows, strict=True)}
