"""Makes plans: checks settings, cuts spans, chooses windows and tables, estimates costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lcray.checkpoints.naming import matches
from lcray.errors import UsageError, suggest
from lcray.layers import Layer
from lcray.planning import Plan, Settings, Span, SplitPlan
from lcray.quadrature import get_rule

_MAX_ELEMENT_ROWS = 1_000_000_000  # of `parameters` shards: P × spans
_MAX_TRACE_ROWS = 10_000_000
_MAX_UNITS = 10_000
_TRACE_SAMPLE = 256
_WINDOWS = 10
_SPANS_A_WORKER = 4
_SPAN_LENGTH = (8, 512)  # short spans pay one more gradient each; long ones lose more in a crash
# Bytes a row of shards and tables together, measured on the MNIST-LeNet example.
_ROW_BYTES = {
    "intervals": 250,
    "layers": 180,
    "units": 20,
    "groups": 22,
    "histograms": 22,
    "parameters": 42,
    "traces": 44,
    "elements": 8,
    "borders": 2,
}
_HISTOGRAM_BINS = 250  # non-empty bins of a layer, sign and window


def make_settings(options: Mapping[str, Any]) -> Settings:
    """`Settings` from keyword arguments.

    Raises:
        UsageError: for one that does not exist or cannot be used.
    """
    valid = [field.name for field in fields(Settings)]
    for name in options:
        if name not in valid:
            raise UsageError(suggest(name, valid, "option"))
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    for name in ("splits", "trace"):
        if isinstance(values.get(name), str):
            values[name] = (values[name],)
    settings = Settings(**values)
    check_settings(settings)
    return settings


def check_settings(settings: Settings) -> None:
    """Refuse settings that cannot be used.

    Raises:
        UsageError: naming the setting, its value and what is valid.
    """
    for name, kinds in _kinds().items():
        value = getattr(settings, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            types = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise UsageError(f"{name.replace('_', '-')} {value!r}: must be of type {types}")
    rule = get_rule(settings.rule)
    if settings.refine and not (rule.refinable and rule.panels == 1):
        raise UsageError(f"rule {settings.rule!r}: cannot be refined; use simpson, or no --refine")
    choices = {"batch_norm": ("running", "batch"), "dtype": ("float32", "float64")}
    for name, valid in choices.items():
        if getattr(settings, name) not in valid:
            raise UsageError(suggest(getattr(settings, name), valid, name.replace("_", "-")))
    for name in ("batch_size", "max_panels", "window"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("batch_seed", "trace_seed"):
        if getattr(settings, name) < 0:
            seed = getattr(settings, name)
            raise UsageError(f"{name.replace('_', '-')} {seed}: must not be negative")
    if settings.splits is not None and not settings.splits:
        raise UsageError("splits: name at least one, or leave the option out for all of the task's")
    if not settings.rtol > 0 or not math.isfinite(settings.rtol):
        raise UsageError(f"rtol {settings.rtol}: must be positive")


@cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """The types that the value of each setting may have."""
    kinds = {}
    for name, hint in get_type_hints(Settings).items():
        parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = tuple(get_origin(part) or part for part in parts)
        kinds[name] = (*plain, int) if float in plain else plain
    return kinds


def make_plan(
    steps: Sequence[int],
    settings: Settings,
    layers: Sequence[Layer],
    splits: Sequence[SplitPlan],
    *,
    workers: int = 1,
    span_length: int | None = None,
    threads: int = 1,
    device_kind: str = "cpu",
) -> Plan:
    """Plan an analysis.

    Args:
        steps: of the checkpoints, ascending.
        settings: what was asked for.
        layers: of the model.
        splits: as a probe found them.
        workers: how many there will be; spans are cut so that each has several.
        span_length: intervals a span, instead.
        threads: intra-op threads a worker.
        device_kind: ``cpu`` or ``cuda``.

    Raises:
        UsageError: for settings that cannot be used, or name layers that do not exist.
    """
    check_settings(settings)
    n_intervals = len(steps) - 1
    if n_intervals < 1:
        raise UsageError(f"{len(steps)} checkpoints: an interval needs two")
    length = span_length or _span_length(n_intervals, workers)
    spans = _cut(steps, length)
    detail = _matching(settings, layers)
    chosen = _tables(settings, layers, splits, len(spans))
    rows = max(1, len(detail) * n_intervals * len(splits))
    if "traces" in chosen:
        _check_traces(settings, layers)
    elif settings.trace:
        raise UsageError(f"trace {settings.trace[0]!r}: the traces table is off; use --parameters")
    return Plan(
        settings=settings,
        layers=tuple(layers),
        splits=tuple(splits),
        spans=spans,
        window=settings.window or _nice(steps[-1] - steps[0]),
        tables=chosen,
        unit_layers=tuple(
            layer.name
            for layer in layers
            if settings.units or layer.n_units <= _MAX_UNITS
            if layer.name in detail or (layer.kind == "buffer" and _wanted(settings, layer.name))
        ),
        detail_layers=detail,
        trace_sample=min(_TRACE_SAMPLE, _MAX_TRACE_ROWS // rows),
        threads=threads,
        device_kind=device_kind,
    )


def check_plan(plan: Plan) -> None:
    """Refuse a plan that `make_plan` would not have made, such as one that was edited by hand.

    Raises:
        UsageError: saying what is wrong with it.
    """
    check_settings(plan.settings)
    names = [layer.name for layer in plan.layers]
    steps = [span.steps for span in plan.spans]
    counts = (plan.window, plan.trace_sample, plan.threads, *(s for part in steps for s in part))
    problems = {
        "numbers that are no integers": any(type(count) is not int for count in counts),
        "no spans, layers or splits": not (plan.spans and plan.layers and plan.splits),
        "spans without intervals": any(len(part) < 2 for part in steps),
        "a window, sample or number of threads out of range": min(plan.window, plan.threads) < 1
        or plan.trace_sample < 0,
        "tables or layers that do not exist": not (
            set(plan.tables) <= set(_ROW_BYTES)
            and set(plan.unit_layers) | set(plan.detail_layers) <= set(names)
        ),
        "a layer or split twice": len({*names}) < len(names)
        or len({split.name for split in plan.splits}) < len(plan.splits),
        "an unknown device kind": plan.device_kind not in ("cpu", "cuda"),
    }
    for problem, found in problems.items():
        if found:
            raise UsageError(f"plan: has {problem}; make a new one with lcray plan --save")
    joined = all(a[-1] == b[0] for a, b in pairwise(steps))
    if not joined or any(a >= b for part in steps for a, b in pairwise(part)):
        raise UsageError("plan: its spans do not follow each other; make a new one")


def extend_plan(plan: Plan, steps: Sequence[int]) -> Plan:
    """`plan` with spans for the steps that follow its last one; the spans it has stay."""
    last = plan.steps[-1]
    later = [last, *(step for step in steps if step > last)]
    if len(later) == 1:
        return plan
    length = max(len(span.steps) - 1 for span in plan.spans)
    return replace(plan, spans=plan.spans + _cut(later, length))


def _span_length(n_intervals: int, workers: int) -> int:
    low, high = _SPAN_LENGTH
    return min(high, max(low, math.ceil(n_intervals / (_SPANS_A_WORKER * workers))))


def _cut(steps: Sequence[int], length: int) -> tuple[Span, ...]:
    starts = range(0, len(steps) - 1, length)
    return tuple(Span(tuple(steps[i : i + length + 1])) for i in starts)


def _nice(width: int) -> int:
    """The width of about ten windows, rounded up to 1, 2 or 5 times a power of ten."""
    exact = max(1.0, width / _WINDOWS)
    power = 10 ** math.floor(math.log10(exact))
    return int(next(m * power for m in (1, 2, 5, 10) if m * power >= exact))


def _matching(settings: Settings, layers: Sequence[Layer]) -> tuple[str, ...]:
    names = [layer.name for layer in layers if layer.kind == "parameter"]
    if settings.layers is None:
        return tuple(names)
    found = tuple(name for name in names if _wanted(settings, name))
    if not found:
        raise UsageError(suggest(settings.layers, names, "layer"))
    return found


def _wanted(settings: Settings, name: str) -> bool:
    return settings.layers is None or matches(name, settings.layers)


def _tables(
    settings: Settings, layers: Sequence[Layer], splits: Sequence[SplitPlan], n_spans: int
) -> tuple[str, ...]:
    size = sum(layer.numel for layer in layers)
    parameters = settings.parameters
    if parameters is None:
        parameters = size * n_spans <= _MAX_ELEMENT_ROWS
    wanted = {
        "intervals": True,
        "layers": True,
        "units": True,
        "groups": any(split.groups for split in splits),
        "histograms": True,
        "parameters": parameters,
        "traces": parameters,
        "elements": settings.elements,
    }
    return tuple(name for name, on in wanted.items() if on)


def _check_traces(settings: Settings, layers: Sequence[Layer]) -> None:
    sizes = {layer.name: layer.numel for layer in layers if layer.kind == "parameter"}
    for item in settings.trace:
        name, _, index = item.rpartition(":")
        if not index.isdecimal() or not name:
            raise UsageError(f"trace {item!r}: must have the form layer:index")
        if name not in sizes:
            raise UsageError(suggest(name, sizes, "layer"))
        if int(index) >= sizes[name]:
            raise UsageError(f"trace {item!r}: the layer has {sizes[name]} elements, from 0")


@dataclass(frozen=True)
class Estimate:
    """What an analysis will take.

    Attributes:
        n_intervals: to integrate.
        n_gradients: full-batch gradients, over all splits; a lower bound under refinement.
        seconds: wall time of the gradients over all workers, likewise; None without a probe.
        disk_bytes: shards and tables together.
        rows: of each table.
        memory_bytes: of one worker; None without a probe.
    """

    n_intervals: int
    n_gradients: int
    seconds: float | None
    disk_bytes: int
    rows: dict[str, int]
    memory_bytes: int | None


def estimate(
    plan: Plan,
    workers: int,
    *,
    seconds: Mapping[str, float] | None = None,
    peak_bytes: int | None = None,
) -> Estimate:
    """Estimate time, memory and disk of `plan`.

    Args:
        plan: the plan.
        workers: that share the spans.
        seconds: of one gradient, by split, as a probe measured them.
        peak_bytes: of a worker in the probe.
    """
    rule = get_rule(plan.settings.rule)
    shared = len(plan.spans) if rule.has_left and rule.has_right else 0
    passes = plan.n_intervals * rule.n_gradients + shared
    passes_by_group = {
        split.name: passes * (1 if split.sorted_by_group else max(1, len(split.groups)))
        for split in plan.splits
    }
    time = None
    if seconds is not None:
        # Idle workers at the end: the longest share counts.
        share = math.ceil(len(plan.spans) / workers) / len(plan.spans)
        time = share * sum(passes_by_group[name] * seconds[name] for name in passes_by_group)
    rows = _rows(plan)
    disk = sum(count * _ROW_BYTES[name] for name, count in rows.items())
    size = sum(layer.numel for layer in plan.layers)
    longest = max(len(span.intervals) for span in plan.spans) / plan.n_intervals
    held = sum(rows.get(name, 0) for name in ("units", "groups", "traces"))  # until the span ends
    extra = size * 8 * (12 + 6 * len(plan.splits)) + int(held * longest * 24)
    return Estimate(
        n_intervals=plan.n_intervals,
        n_gradients=passes * len(plan.splits),
        seconds=time,
        disk_bytes=disk,
        rows={name: count for name, count in rows.items() if name != "borders"},
        memory_bytes=None if peak_bytes is None else peak_bytes + extra,
    )


def _rows(plan: Plan) -> dict[str, int]:
    splits, intervals = len(plan.splits), plan.n_intervals
    layers = {layer.name: layer for layer in plan.layers}
    detail = [layers[name] for name in plan.detail_layers]
    size = sum(layer.numel for layer in detail)
    ends = plan.window_of(plan.steps[0]), plan.window_of(plan.steps[-2])
    windows = (ends[1] - ends[0]) // plan.window + 1
    groups = sum(len(split.groups) for split in plan.splits)
    samples = sum(min(plan.trace_sample, layer.numel) for layer in detail)
    bins = sum(2 * min(_HISTOGRAM_BINS, layer.numel) for layer in detail)
    rows = {
        "intervals": splits * intervals,
        "layers": splits * intervals * len(plan.layers),
        "units": splits * intervals * sum(layers[name].n_units for name in plan.unit_layers),
        "groups": groups * intervals * len(plan.layers),
        "histograms": splits * windows * bins,
        "parameters": splits * size,
        "traces": splits * intervals * samples,
        "elements": splits * intervals * size,
    }
    chosen = {name: rows[name] for name in plan.tables}
    chosen["borders"] = splits * size * len(plan.spans)
    return chosen
