"""Checks of settings and plans, whether they come from a caller or from a file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lcray.allocation.quadrature import MAX_PANELS, RETIRED, get_rule
from lcray.errors import UsageError, suggest
from lcray.planning.costs import ROW_BYTES
from lcray.planning.plan import MEMORY_FORMATS, Plan, SplitPlan, memory_format_of
from lcray.settings import Settings, flag_of, option_of
from lcray.storage.json_types import LIMIT, MAX_AXES
from lcray.storage.numbers import whole_number
from lcray.tasks.layer import Layer

DTYPES = ("float32", "float64")


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
    if settings.rule.partition("*")[0] in RETIRED:
        raise UsageError(
            f"rule {settings.rule!r}: is no longer offered; use simpson-sampled, which takes fewer "
            "gradients with a stated error, or simpson with --refine"
        )
    if rule.block:
        _check_sampled(settings)
    if settings.refine and not (rule.refinable and rule.panels == 1):
        raise UsageError(f"rule {settings.rule!r}: cannot be refined; use simpson, or no --refine")
    for each in fields(Settings):
        told, value = option_of(each), getattr(settings, each.name)
        if told.choices and not told.metavar and value not in told.choices:
            raise UsageError(suggest(value, told.choices, flag_of(each)))
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
    for name in ("rtol", "sampling_error"):
        value = getattr(settings, name)
        if not value > 0 or not math.isfinite(value):
            raise UsageError(f"{name.replace('_', '-')} {value}: must be positive")


def _check_sampled(settings: Settings) -> None:
    """Refuse settings that do not go with a rule that takes samples of the batches."""
    reasons = {
        "refine": settings.refine and "its midpoints are estimates; leave it out",
        "samples": settings.samples and "it samples batches of all data itself; leave it out",
        "batch-norm": settings.batch_norm == "batch" and "batches are part of the loss; running",
        "partial-sums": (settings.partial_sums or 1) > 1 and "it adds gradients in one part",
    }
    for name, reason in reasons.items():
        if reason:
            raise UsageError(f"{name}: cannot be used with rule {settings.rule!r}: {reason}")


@cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """The types that the value of each setting may have."""
    kinds = {}
    for name, hint in get_type_hints(Settings).items():
        parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = tuple(get_origin(part) or part for part in parts)
        kinds[name] = (*plain, int) if float in plain else plain
    return kinds


def read_plan(data: Any) -> Plan:
    """The plan that JSON values describe; every plan in a file is read by this function.

    It refuses values that no plan can have, so that a plan can be relied on. It accepts plans that
    `make_plan` would not make today, since an earlier lcray may have made them.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: saying what is wrong with it.
    """
    plan = Plan.from_dict(data)
    for problem in _impossible(plan):
        raise ValueError(problem)
    return plan


def check_plan(plan: Plan) -> None:
    """Refuse a plan that `make_plan` would not have made, such as one that was edited by hand.

    Raises:
        UsageError: saying what is wrong with it.
    """
    check_settings(plan.settings)
    check_traces(plan.settings, plan.layers, on="traces" in plan.tables)
    for problem in itertools.chain(_untyped(plan), _impossible(plan), _unplanned(plan)):
        raise UsageError(f"plan: has {problem}; make a new one with lcray plan --save")


def _untyped(plan: Plan) -> Iterator[str]:
    sizes = (plan.window, plan.trace_sample, plan.threads, plan.batch_size, plan.partial_sums)
    counts = (*sizes, *(step for span in plan.spans for step in span.steps))
    if any(type(count) is not int for count in counts):
        yield "numbers that are no integers"
    seconds = plan.seconds
    if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < math.inf):
        yield "invalid `seconds`, which must be a non-negative number"


def _impossible(plan: Plan) -> Iterator[str]:
    """Values that no plan can have, of any version of lcray."""
    if not (plan.spans and plan.layers and plan.splits):
        yield "no spans, layers or splits"
    if any(span.n_intervals < 1 or span.first < 0 for span in plan.spans):
        yield "spans without intervals, or negative steps"
    if any(a.last > b.first for a, b in pairwise(plan.spans)) or any(
        a >= b for span in plan.spans for a, b in span.intervals
    ):
        yield "spans that do not follow each other"
    for names in ([s.name for s in plan.splits], [layer.name for layer in plan.layers]):
        if len(set(names)) < len(names):
            yield "a layer or split twice"
    for layer in plan.layers:
        yield from (f"a layer {layer.name!r} {problem}" for problem in _impossible_layer(layer))
    for split in plan.splits:
        if not _is_sample(split):
            yield f"a split {split.name!r} with an impossible sample"
        if split.reference is not None and len(split.reference.norms) != len(plan.layers):
            yield f"a split {split.name!r} with gradients of other layers"
    try:
        get_rule(plan.settings.rule)
    except UsageError as error:
        yield f"an unusable {error}"
    if plan.settings.dtype not in DTYPES:
        yield f"an unknown dtype {plan.settings.dtype!r}"
    sizes = (plan.window, plan.threads, plan.batch_size, plan.trace_sample + 1)
    if min(*sizes, plan.partial_sums) < 1:
        yield "a window, sample, batch size or number of threads or sums out of range"


def _is_sample(split: SplitPlan) -> bool:
    weights, count = split.replicate_weights, len(split.replicate_weights)
    if split.drawn_from is None:
        return count == 0
    return (
        2 <= count <= split.n_samples < split.drawn_from
        and math.isclose(sum(weights), split.total_weight, rel_tol=1e-9)
        and min(weights) >= 0
        and 0 < sum(weights) < math.inf
    )


def _impossible_layer(layer: Layer) -> Iterator[str]:
    if layer.kind not in ("parameter", "buffer"):
        yield f"of unknown kind {layer.kind!r}"
    axes, axis = layer.shape, layer.unit_axis
    short = len(axes) <= MAX_AXES and all(n >= 0 for n in axes)
    if not short or math.prod(max(n, 1) for n in axes) >= LIMIT:
        yield "of impossible shape"
    if axis is not None and not 0 <= axis < len(axes):
        yield f"without the axis {axis}"
    groups = layer.unit_groups
    if groups != 1 and not (axis == 1 and 1 < groups <= axes[0] and axes[0] % groups == 0):
        yield "with impossible groups of units"


def _unplanned(plan: Plan) -> Iterator[str]:
    """Values that `make_plan` does not give a plan."""
    settings, names = plan.settings, {layer.name for layer in plan.layers}
    if any(a.last != b.first for a, b in pairwise(plan.spans)):
        yield "spans with gaps between them"
    if (
        settings.batch_size not in (None, plan.batch_size)
        or settings.partial_sums not in (None, plan.partial_sums)
        or memory_format_of(settings) not in (None, plan.memory_format)
    ):
        yield "another batch size, number of sums or memory format than its settings"
    if plan.memory_format not in MEMORY_FORMATS:
        yield "an unknown memory format"
    if not set(plan.tables) <= set(ROW_BYTES) - {"fits"}:
        yield "tables that do not exist"
    if not set(plan.unit_layers) | set(plan.detail_layers) <= names:
        yield "units or details of layers that do not exist"
    if plan.device_kind not in ("cpu", "cuda"):
        yield "an unknown device kind"


def check_traces(settings: Settings, layers: Sequence[Layer], *, on: bool = True) -> None:
    """Refuse named elements that the layers do not have, and all if the table is not `on`.

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
            raise UsageError(
                f"trace {item!r}: available only after the analysis; then run lcray trace"
            )
        if name not in sizes:
            raise UsageError(suggest(name, sizes, "layer"))
        if number >= sizes[name]:
            raise UsageError(f"trace {item!r}: the layer has {sizes[name]} elements, from 0")


def check_fisher(every: int, steps: Sequence[int]) -> None:
    """Refuse an interval of Fisher information that no step is a multiple of."""
    if not any(step % every == 0 for step in steps):
        raise UsageError(
            f"fisher {every}: none of the steps {steps[0]} to {steps[-1]} is a multiple of it; "
            "give a smaller number"
        )
