"""Everything that is chosen before the first gradient: settings, layers, splits, spans, windows.

A plan is data. One plan gives the same tables, bit for bit, for any number of workers and in any
order in which they finish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from typing import Any, get_type_hints

from lcray.settings import Settings
from lcray.storage.json_types import build, value_of
from lcray.tasks.layer import Layer

#: Samples per batch if none were asked for and no probe may choose.
DEFAULT_BATCH_SIZE = 256
DEFAULT_MEMORY_FORMAT = "contiguous"
MEMORY_FORMATS = (DEFAULT_MEMORY_FORMAT, "channels_last")


class Span:
    """A contiguous block of intervals: the unit of work, retry and commit. Compared by its steps.

    Evenly spaced steps are kept as a range, since a run may have a million of them.

    Args:
        steps: the steps of its checkpoints, one more than its intervals.
    """

    __slots__ = ("_steps",)

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps: Sequence[int] = tuple(steps)
        kinds = {*map(type, self._steps)}
        if kinds != {int} and bool not in kinds and all(issubclass(k, Integral) for k in kinds):
            self._steps, kinds = tuple(map(int, self._steps)), {int}  # those of NumPy
        if len(self._steps) > 1 and kinds == {int}:
            first, stride = self._steps[0], self._steps[1] - self._steps[0]
            last = first + stride * (len(self._steps) - 1)
            if stride > 0 and last == self._steps[-1]:  # else the range might be endless
                even = range(first, last + 1, stride)
                self._steps = even if (*even,) == self._steps else self._steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Span) and self._steps == other._steps

    def __hash__(self) -> int:
        return hash(self._steps)

    def __repr__(self) -> str:
        return f"Span(steps={self.steps})"

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of its checkpoints, one more than its intervals."""
        return tuple(self._steps)

    @property
    def first(self) -> int:
        """The step its first interval starts at."""
        return self._steps[0]

    @property
    def last(self) -> int:
        """The step its last interval ends at."""
        return self._steps[-1]

    @property
    def name(self) -> str:
        """The name of its folder under ``shards/``."""
        return f"{self.first:08d}-{self.last:08d}"

    @property
    def n_intervals(self) -> int:
        """The number of its intervals."""
        return len(self._steps) - 1

    @property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """(start_step, end_step) of each interval."""
        return tuple(pairwise(self._steps))


@dataclass(frozen=True)
class Crew:
    """The workers that a plan is made for.

    Attributes:
        workers: how many, or how many teams; spans are cut so that each has several.
        team: workers that share a gradient.
        threads: intra-op threads per worker.
        device_kind: ``cpu`` or ``cuda``.
    """

    workers: int = 1
    team: int = 1
    threads: int = 1
    device_kind: str = "cpu"


@dataclass(frozen=True)
class Probed:
    """Measurements and choices of a probe; empty without a probe.

    Attributes:
        seconds: duration of one gradient, by split.
        read_seconds: duration of reading a checkpoint.
        fisher_seconds: duration of the Fisher information of all splits at a step.
        batch_size: the batch size, if the settings leave it open.
        memory_format: the memory format, likewise.
    """

    seconds: Mapping[str, float] | None = None
    read_seconds: float = 0.0
    fisher_seconds: float = 0.0
    batch_size: int | None = None
    memory_format: str | None = None


@dataclass(frozen=True)
class Reference:
    """A worker's result for a few samples of a split at the first checkpoint.

    Attributes:
        loss: their mean loss.
        norms: the norm of its gradient by layer, [L].
    """

    loss: float
    norms: tuple[float, ...]


@dataclass(frozen=True)
class SplitPlan:
    """How one split is evaluated.

    Attributes:
        name: of the split.
        n_samples: samples that are evaluated.
        n_items: items the loss is a mean over.
        total_weight: Σ w over the items.
        first_loss: the mean loss at the first checkpoint; it scales atol; None if not finite.
        n_batches: batches per evaluation.
        groups: the labels of the groups, in order; empty where the task has none.
        group_weights: Σ w of each group.
        sorted_by_group: whether every batch holds one group, so that groups cost nothing.
        drawn_from: samples in the data set, where some were drawn from it; None where all are
            evaluated.
        replicate_weights: Σ w of each replicate of the samples that were drawn.
        reference: what every worker must find for a few samples; None if it was not measured, or is
            not finite.
    """

    name: str
    n_samples: int
    n_items: int
    total_weight: float
    first_loss: float | None
    n_batches: int
    groups: tuple[int, ...] = ()
    group_weights: tuple[float, ...] = ()
    sorted_by_group: bool = False
    drawn_from: int | None = None
    replicate_weights: tuple[float, ...] = ()
    reference: Reference | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Plan:
    """Everything chosen before the first gradient.

    Attributes:
        settings: what was asked for.
        layers: the model's layers, in its order (the order of the rows of every table).
        splits: the splits, in the task's order.
        spans: contiguous, in order of steps.
        window: width of the base windows, in steps.
        tables: names of the tables that the spans write.
        unit_layers: the layers with rows in `units`.
        detail_layers: the layers with rows in `units`, `histograms`, `parameters`, `traces` and
            `elements`.
        trace_sample: elements sampled per layer for `traces`.
        threads: intra-op threads per worker.
        device_kind: ``cpu`` or ``cuda``.
        batch_size: the most samples per batch, from the settings or a probe.
        memory_format: ``contiguous`` or ``channels_last``, likewise.
        partial_sums: parts that the batches of a split are summed in; parts are added in their
            order, whoever computed them.
        seconds: duration of an interval on one worker, from a probe; None without one. It only
            decides when a worker counts as hanging or straggling, and nothing in the tables.
    """

    settings: Settings
    layers: tuple[Layer, ...]
    splits: tuple[SplitPlan, ...]
    spans: tuple[Span, ...]
    window: int
    tables: tuple[str, ...]
    unit_layers: tuple[str, ...]
    detail_layers: tuple[str, ...]
    trace_sample: int
    threads: int = 1
    device_kind: str = "cpu"
    batch_size: int = DEFAULT_BATCH_SIZE
    memory_format: str = DEFAULT_MEMORY_FORMAT
    partial_sums: int = 1
    seconds: float | None = field(default=None, compare=False)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of all checkpoints, in order."""
        return tuple(s for span in self.spans for s in span.steps[:-1]) + self.spans[-1].steps[-1:]

    @cached_property
    def n_intervals(self) -> int:
        """The number of intervals."""
        return sum(span.n_intervals for span in self.spans)

    def without_spans(self) -> Plan:
        """The part of the plan that a worker needs besides its span; its size is fixed."""
        return replace(self, spans=self.spans[:1])  # the first span has the start of the run

    def fisher_steps(self, span: Span) -> list[int]:
        """The steps of `span` with rows in `fisher`: not its first, which ends another span.

        Only the first span also has its first step. This stays the same when a run grows.
        """
        every = self.settings.fisher
        if every is None or "fisher" not in self.tables:
            return []
        steps = span.steps if span.first == self.spans[0].first else span.steps[1:]
        return [step for step in steps if step % every == 0]

    def window_of(self, start_step: int) -> int:
        """The first step of the base window of an interval that starts at `start_step`."""
        return start_step // self.window * self.window

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        data = {name: getattr(self, name) for name in _PLAIN}
        return {
            "settings": asdict(self.settings),
            "layers": [layer.to_dict() for layer in self.layers],
            "splits": [asdict(split) for split in self.splits],
            "spans": [list(span.steps) for span in self.spans],
            **data,
            "partial_sums": self.partial_sums,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_dict` described, unchecked: `lcray.planning.check.read_plan` checks it.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: for what has other fields or types.
        """
        hints = get_type_hints(cls)
        return cls(
            settings=build(Settings, data["settings"]),
            layers=tuple(build(Layer, layer) for layer in data["layers"]),
            splits=tuple(build(SplitPlan, split) for split in data["splits"]),
            spans=tuple(Span(value_of(tuple[int, ...], s, "span")) for s in data["spans"]),
            **{name: value_of(hints[name], data[name], name) for name in _PLAIN},
            partial_sums=value_of(int, data.get("partial_sums", 1), "partial_sums"),
            seconds=value_of(hints["seconds"], data.get("seconds"), "seconds"),
        )


_PLAIN = (
    "window",
    "tables",
    "unit_layers",
    "detail_layers",
    "trace_sample",
    "threads",
    "device_kind",
    "batch_size",
    "memory_format",
)


def memory_format_of(settings: Settings) -> str | None:
    """The memory format in the settings; None for any."""
    return None if settings.memory_format == "auto" else settings.memory_format
