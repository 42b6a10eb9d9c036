"""Makes plans: checks settings, cuts spans, chooses windows and tables. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from lcray.allocation.quadrature import get_rule
from lcray.checkpoints.naming import matches
from lcray.errors import UsageError, suggest
from lcray.planning.check import check_fisher, check_settings, check_traces
from lcray.planning.costs import largest_share, passes_by_group
from lcray.planning.plan import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MEMORY_FORMAT,
    Crew,
    Plan,
    Probed,
    SplitPlan,
    memory_format_of,
)
from lcray.planning.spans import MAX_ELEMENT_ROWS, choose_length, cut, cut_tapering, timed_length
from lcray.settings import Settings
from lcray.tasks.layer import Layer

_MAX_TRACE_ROWS = 10_000_000
_MAX_UNITS = 10_000
_TRACE_SAMPLE = 256
_WINDOWS = 10


def make_settings(options: Mapping[str, object]) -> Settings:
    """`Settings` from keyword arguments.

    Raises:
        UsageError: for an option that does not exist or cannot be used.
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


def make_plan(
    steps: Sequence[int],
    settings: Settings,
    layers: Sequence[Layer],
    splits: Sequence[SplitPlan],
    *,
    crew: Crew = Crew(),  # noqa: B008 - frozen
    probed: Probed = Probed(),  # noqa: B008
    partial_sums: int | None = None,
    span_length: int | None = None,
    grows: bool = False,
) -> Plan:
    """Plan an analysis.

    Args:
        steps: steps of the checkpoints, ascending.
        settings: settings of the analysis.
        layers: layers of the model.
        splits: the splits from a probe.
        crew: the workers of the analysis.
        probed: measurements and choices of a probe.
        partial_sums: number of partial sums of a gradient, if the settings leave it open.
        span_length: intervals per span; None lets `lcray.planning.spans` choose.
        grows: whether the run is followed, so that later steps may be multiples of `fisher`.

    Raises:
        UsageError: for settings that cannot be used, or that name missing layers.
    """
    check_settings(settings)
    n_intervals = len(steps) - 1
    if n_intervals < 1:
        raise UsageError(f"{len(steps)} checkpoints: an interval needs two")
    expected = None
    if probed.seconds is not None:
        expected = _interval_seconds(settings, splits, probed.seconds)
    sums = settings.partial_sums or partial_sums or 1
    every = get_rule(settings.rule).block
    if every and sums > 1:
        raise UsageError(
            f"rule {settings.rule!r}: adds gradients in one part, so workers cannot share one; "
            "leave --data-parallel out"
        )
    if every and span_length and span_length % every:
        raise UsageError(
            f"span-length {span_length}: must be a multiple of {every} with rule {settings.rule!r},"
            " whose samples follow from earlier intervals of such a block"
        )
    detail = _matching(settings, layers)
    if span_length:
        spans = cut(steps, span_length)
    else:
        size = 0 if settings.parameters is False else sum(layer.numel for layer in layers)
        pace = None if expected is None else expected * largest_share(sums, crew.team)
        length = choose_length(
            n_intervals, workers=crew.workers, every=every, seconds=pace, size=size
        )
        spans = cut_tapering(steps, length, every)
    if settings.fisher is not None:
        if not grows:
            check_fisher(settings.fisher, steps)
        if expected is not None:
            n_steps = sum(step % settings.fisher == 0 for step in steps)
            expected += probed.fisher_seconds * n_steps / n_intervals
    chosen = _tables(settings, layers, splits, len(spans))
    rows = max(1, len(detail) * n_intervals * len(splits))
    check_traces(settings, layers, on="traces" in chosen)
    return Plan(
        settings=settings,
        layers=tuple(layers),
        splits=tuple(splits),
        spans=spans,
        window=settings.window or _nice(steps[-1] - steps[0]),
        tables=chosen,
        unit_layers=_with_units(settings, layers, detail),
        detail_layers=detail,
        trace_sample=min(_TRACE_SAMPLE, _MAX_TRACE_ROWS // rows),
        threads=crew.threads,
        device_kind=crew.device_kind,
        batch_size=settings.batch_size or probed.batch_size or DEFAULT_BATCH_SIZE,
        memory_format=memory_format_of(settings) or probed.memory_format or DEFAULT_MEMORY_FORMAT,
        partial_sums=sums,
        seconds=None if expected is None else expected + probed.read_seconds,
    )


def extend_plan(plan: Plan, steps: Sequence[int], length: int | None = None) -> Plan:
    """`plan` with additional spans for the steps after its last one; its spans stay.

    Args:
        plan: the plan.
        steps: steps of all checkpoints so far.
        length: number of intervals of the new spans; None for the length of the longest span.
    """
    last = plan.steps[-1]
    later = [last, *(step for step in steps if step > last)]
    if len(later) == 1:
        return plan
    longest = max(span.n_intervals for span in plan.spans)
    return replace(plan, spans=plan.spans + cut(later, length or longest))


def following_length(plan: Plan) -> int:
    """The number of intervals of new spans for `plan`, while its run still grows."""
    longest = max(span.n_intervals for span in plan.spans)
    every = get_rule(plan.settings.rule).block
    return max(longest, 1 if plan.seconds is None else timed_length(plan.seconds, every))


def _interval_seconds(
    settings: Settings, splits: Sequence[SplitPlan], seconds: Mapping[str, float]
) -> float:
    """Seconds of the gradients of an interval, without refinement."""
    passes = get_rule(settings.rule).n_gradients
    return sum(passes * passes_by_group(split) * seconds[split.name] for split in splits)


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


def _with_units(
    settings: Settings, layers: Sequence[Layer], detail: Sequence[str]
) -> tuple[str, ...]:
    """The layers in the units table."""
    return tuple(
        layer.name
        for layer in layers
        if settings.units or layer.n_units <= _MAX_UNITS
        if layer.name in detail or (layer.kind == "buffer" and _wanted(settings, layer.name))
    )


def _wanted(settings: Settings, name: str) -> bool:
    return settings.layers is None or matches(name, settings.layers)


def _tables(
    settings: Settings, layers: Sequence[Layer], splits: Sequence[SplitPlan], n_spans: int
) -> tuple[str, ...]:
    size = sum(layer.numel for layer in layers)
    parameters = settings.parameters
    if parameters is None:
        parameters = size * n_spans <= MAX_ELEMENT_ROWS
    wanted = {
        "intervals": True,
        "layers": True,
        "units": True,
        "groups": any(split.groups for split in splits),
        "replicates": any(split.replicate_weights for split in splits),
        "replicate_layers": any(split.replicate_weights for split in splits),
        "histograms": True,
        "parameters": parameters,
        "traces": parameters,
        "elements": settings.elements,
        "fisher": settings.fisher is not None,
    }
    return tuple(name for name, on in wanted.items() if on)
