"""Makes plans: checks settings, cuts spans, chooses windows and tables. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lcray.allocation.quadrature import MAX_PANELS, get_rule
from lcray.checkpoints.naming import matches
from lcray.errors import UsageError, suggest
from lcray.planning.costs import ROW_BYTES, passes_by_group
from lcray.planning.plan import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MEMORY_FORMAT,
    Plan,
    Span,
    SplitPlan,
    largest_share,
    memory_format_of,
)
from lcray.planning.spans import MAX_ELEMENT_ROWS, choose_length, cut, cut_tapering, timed_length
from lcray.settings import Settings
from lcray.storage.json_types import LIMIT
from lcray.storage.numerals import whole_number
from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import MEMORY_FORMATS

_MAX_TRACE_ROWS = 10_000_000
_MAX_UNITS = 10_000
_TRACE_SAMPLE = 256
_WINDOWS = 10


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
        if isinstance(value, int) and abs(value) >= LIMIT:  # nobody could read the plan
            raise UsageError(f"{name.replace('_', '-')}: must be below {LIMIT:g}")
    rule = get_rule(settings.rule)
    if settings.refine and not (rule.refinable and rule.panels == 1):
        raise UsageError(f"rule {settings.rule!r}: cannot be refined; use simpson, or no --refine")
    choices = {
        "batch_norm": ("running", "batch"),
        "dtype": ("float32", "float64"),
        "memory_format": ("auto", *MEMORY_FORMATS),
        "fisher_kind": ("both", "empirical"),
    }
    for name, valid in choices.items():
        if getattr(settings, name) not in valid:
            raise UsageError(suggest(getattr(settings, name), valid, name.replace("_", "-")))
    counts = ("batch_size", "max_panels", "partial_sums", "window", "fisher", "fisher_samples")
    for name in counts:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', '-')} {value}: must be at least 1")
    if settings.max_panels > MAX_PANELS:
        raise UsageError(f"max-panels {settings.max_panels}: at most {MAX_PANELS}")
    if settings.samples is not None and settings.samples < 2:
        raise UsageError(f"samples {settings.samples}: must be at least 2, to tell how they differ")
    if settings.fisher is not None and settings.batch_norm == "batch":
        raise UsageError(
            "fisher: needs the loss of single samples, but with batch-norm 'batch' it depends on "
            "their batch; analyze with --batch-norm running, or without --fisher"
        )
    for name in ("batch_seed", "trace_seed", "sample_seed", "fisher_seed"):
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
    team: int = 1,
    partial_sums: int | None = None,
    span_length: int | None = None,
    threads: int = 1,
    device_kind: str = "cpu",
    batch_size: int | None = None,
    memory_format: str | None = None,
    seconds: Mapping[str, float] | None = None,
    read_seconds: float = 0.0,
    fisher_seconds: float = 0.0,
    grows: bool = False,
) -> Plan:
    """Plan an analysis.

    Args:
        steps: of the checkpoints, ascending.
        settings: what was asked for.
        layers: of the model.
        splits: as a probe found them.
        workers: how many there will be, or teams of them; spans are cut so that each has several.
        team: workers that share a gradient.
        partial_sums: parts to sum gradients in, where the settings leave it open.
        span_length: intervals a span; `lcray.planning.spans` chooses where it is None.
        threads: intra-op threads a worker.
        device_kind: ``cpu`` or ``cuda``.
        batch_size: as a probe chose it, where the settings leave it open.
        memory_format: likewise.
        seconds: of one gradient, by split, as a probe measured them.
        read_seconds: of reading a checkpoint.
        fisher_seconds: of the Fisher information of all splits at a step.
        grows: whether the run is followed, so that later steps may be multiples.

    Raises:
        UsageError: for settings that cannot be used, or name layers that do not exist.
    """
    check_settings(settings)
    n_intervals = len(steps) - 1
    if n_intervals < 1:
        raise UsageError(f"{len(steps)} checkpoints: an interval needs two")
    expected = None if seconds is None else _interval_seconds(settings, splits, seconds)
    sums = settings.partial_sums or partial_sums or 1
    detail = _matching(settings, layers)
    if span_length:
        spans = cut(steps, span_length)
    else:
        size = 0 if settings.parameters is False else sum(layer.numel for layer in layers)
        pace = None if expected is None else expected * largest_share(sums, team)
        spans = _spans(steps, workers, get_rule(settings.rule).probe_every, pace, size)
    if settings.fisher is not None:
        if not grows:
            _check_fisher(settings.fisher, steps)
        if expected is not None:
            expected += fisher_seconds * sum(s % settings.fisher == 0 for s in steps) / n_intervals
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
        threads=threads,
        device_kind=device_kind,
        batch_size=settings.batch_size or batch_size or DEFAULT_BATCH_SIZE,
        memory_format=memory_format_of(settings) or memory_format or DEFAULT_MEMORY_FORMAT,
        partial_sums=sums,
        seconds=None if expected is None else expected + read_seconds,
    )


def check_plan(plan: Plan) -> None:
    """Refuse a plan that `make_plan` would not have made, such as one that was edited by hand.

    Raises:
        UsageError: saying what is wrong with it.
    """
    check_settings(plan.settings)
    check_traces(plan.settings, plan.layers, on="traces" in plan.tables)
    names = [layer.name for layer in plan.layers]
    steps = [span.steps for span in plan.spans]
    sizes = (plan.window, plan.trace_sample, plan.threads, plan.batch_size, plan.partial_sums)
    counts = (*sizes, *(step for part in steps for step in part))
    problems = {
        "numbers that are no integers": any(type(count) is not int for count in counts),
        "no spans, layers or splits": not (plan.spans and plan.layers and plan.splits),
        "spans without intervals": any(len(part) < 2 for part in steps),
        "a window, sample, batch size or number of threads or sums out of range": (
            plan.trace_sample < 0
            or min(plan.window, plan.threads, plan.batch_size, plan.partial_sums) < 1
        ),
        "another batch size, number of sums or memory format than its settings": (
            plan.settings.batch_size not in (None, plan.batch_size)
            or plan.settings.partial_sums not in (None, plan.partial_sums)
            or memory_format_of(plan.settings) not in (None, plan.memory_format)
        ),
        "an unknown memory format": plan.memory_format not in MEMORY_FORMATS,
        "tables or layers that do not exist": not (
            set(plan.tables) <= set(ROW_BYTES) - {"fits"}
            and set(plan.unit_layers) | set(plan.detail_layers) <= set(names)
        ),
        "a layer or split twice": len({*names}) < len(names)
        or len({split.name for split in plan.splits}) < len(plan.splits),
        "an expected duration that is none": plan.seconds is not None
        and not (type(plan.seconds) in (int, float) and 0 <= plan.seconds < math.inf),
        "an unknown device kind": plan.device_kind not in ("cpu", "cuda"),
    }
    for problem, found in problems.items():
        if found:
            raise UsageError(f"plan: has {problem}; make a new one with lcray plan --save")
    joined = all(a[-1] == b[0] for a, b in pairwise(steps))
    if not joined or any(a >= b for part in steps for a, b in pairwise(part)):
        raise UsageError("plan: its spans do not follow each other; make a new one")


def extend_plan(plan: Plan, steps: Sequence[int], length: int | None = None) -> Plan:
    """`plan` with spans for the steps that follow its last one; the spans it has stay.

    Args:
        plan: the plan.
        steps: of the checkpoints that there are now.
        length: intervals of the new spans; those of the plan's longest where it is None.
    """
    last = plan.steps[-1]
    later = [last, *(step for step in steps if step > last)]
    if len(later) == 1:
        return plan
    longest = max(span.n_intervals for span in plan.spans)
    return replace(plan, spans=plan.spans + cut(later, length or longest))


def following_length(plan: Plan) -> int:
    """Intervals of the spans to add to `plan` while its run still grows."""
    longest = max(span.n_intervals for span in plan.spans)
    every = get_rule(plan.settings.rule).probe_every
    return max(longest, 1 if plan.seconds is None else timed_length(plan.seconds, every))


def _interval_seconds(
    settings: Settings, splits: Sequence[SplitPlan], seconds: Mapping[str, float]
) -> float:
    """What the gradients of an interval take, where none is refined."""
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


def _spans(
    steps: Sequence[int], workers: int, every: int, seconds: float | None, size: int
) -> tuple[Span, ...]:
    intervals = len(steps) - 1
    length = choose_length(intervals, workers=workers, every=every, seconds=seconds, size=size)
    return cut_tapering(steps, length, every)


def _with_units(
    settings: Settings, layers: Sequence[Layer], detail: Sequence[str]
) -> tuple[str, ...]:
    """The layers that the units table has."""
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


def _check_fisher(every: int, steps: Sequence[int]) -> None:
    if not any(step % every == 0 for step in steps):
        raise UsageError(
            f"fisher {every}: none of the steps {steps[0]} to {steps[-1]} is a multiple of it; "
            "give a smaller number"
        )


def check_traces(settings: Settings, layers: Sequence[Layer], *, on: bool = True) -> None:
    """Refuse named elements that the layers do not have, or any where the table is not `on`.

    Raises:
        UsageError: naming the first.
    """
    if settings.trace and not on:
        raise UsageError(f"trace {settings.trace[0]!r}: the traces table is off; use --parameters")
    sizes = {layer.name: layer.numel for layer in layers if layer.kind == "parameter"}
    for item in settings.trace:
        name, _, index = item.rpartition(":")
        number = whole_number(index)
        if number is None or not name:
            raise UsageError(f"trace {item!r}: must have the form layer:index")
        if name == "top" and name not in sizes:
            raise UsageError(f"trace {item!r}: known only once LC is: lcray trace, afterwards")
        if name not in sizes:
            raise UsageError(suggest(name, sizes, "layer"))
        if number >= sizes[name]:
            raise UsageError(f"trace {item!r}: the layer has {sizes[name]} elements, from 0")
