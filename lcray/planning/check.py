"""What settings and plans must be, whether they were asked for or read from a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from lcray.allocation.quadrature import MAX_PANELS, get_rule
from lcray.errors import UsageError, suggest
from lcray.planning.costs import ROW_BYTES
from lcray.planning.plan import (
    Plan,
    memory_format_of,
)
from lcray.settings import Settings, flag_of, option_of
from lcray.storage.json_types import LIMIT
from lcray.storage.numerals import whole_number
from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import MEMORY_FORMATS


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


def check_fisher(every: int, steps: Sequence[int]) -> None:
    """Refuse an interval of Fisher information that no step is a multiple of."""
    if not any(step % every == 0 for step in steps):
        raise UsageError(
            f"fisher {every}: none of the steps {steps[0]} to {steps[-1]} is a multiple of it; "
            "give a smaller number"
        )
