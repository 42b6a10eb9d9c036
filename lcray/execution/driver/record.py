"""The content of an output's record, and checks that an analysis matches a record or a plan."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import lcray
from lcray.errors import OutputError, UsageError
from lcray.execution.worker.descriptions import Description
from lcray.execution.worker.fresh import Unexplained
from lcray.planning.plan import DEFAULT_BATCH_SIZE, Plan
from lcray.settings import Settings
from lcray.storage import Place
from lcray.tables.record import Record
from lcray.tasks.layer import Layer


def make_fingerprint(description: Description) -> dict[str, Any]:
    """What decides the numbers besides settings and plan."""
    declared = {"batch_loss": True} if description.batch_loss else {}
    return {
        **declared,
        "task source": description.source_hash,
        "data": description.split_hashes,
        "base model": description.base_hash,
        "first checkpoint": description.first_hash,
        "device": description.device,
        "lcray": lcray.__version__,
        "torch": version("torch"),
        "numpy": version("numpy"),
    }


def make_notes(
    description: Description,
    settings: Settings,
    unexplained: Unexplained | None = None,
    late_start: str | None = None,
) -> tuple[str, ...]:
    """Remarks on the numbers of an analysis; `late_start` is that of its series."""
    few, many = description.low_precision, description.double_precision
    notes = [] if late_start is None else [late_start]
    for name, (taken, population) in description.drawn.items():
        notes.append(
            f"split {name!r}: {taken:,} of {population:,} samples, drawn at random with seed "
            f"{settings.sample_seed}: losses and LC are estimates; confidence() of lcray.open says "
            "how far they may be off"
        )
    if description.batch_loss:
        size = settings.batch_size or DEFAULT_BATCH_SIZE
        notes.append(
            f"batches of up to {size} samples, permuted by seed {settings.batch_seed}: the task "
            "declares that they are part of the loss (batch_loss=True), so their size decides the "
            "numbers and is not tuned; --batch-size sets it"
        )
    elif description.fixed_batches and settings.batch_size is None:
        notes.append(
            f"batches of up to {DEFAULT_BATCH_SIZE} samples: BatchNorm takes their statistics, so "
            "their size decides the numbers and is not tuned; --batch-size sets it"
        )
    if few:
        notes.append(
            f"{len(few)} of {len(description.layers)} layers are stored in 16 bits or fewer: "
            f"updates too small for them show as no movement, and get no LC ({few[0]}, …)"
        )
    if many and settings.dtype == "float32":
        notes.append(
            f"{len(many)} of {len(description.layers)} layers are stored in float64 but analyzed "
            f"in float32, which rounds small updates away; use --dtype float64 ({many[0]}, …)"
        )
    return (*notes, *(unexplained or Unexplained()).notes)


def carrier_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that only carry the numbers."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "pyarrow", "safetensors", "scipy")},
    }


def check_same_settings(out: Place, record: Record, settings: Settings) -> None:
    """Refuse to continue an output under other settings.

    Raises:
        OutputError: naming what differs.
    """
    _refuse(out, _differences(asdict(record.plan.settings), asdict(settings)))


def check_same_numbers(
    out: Place, record: Record, description: Description, layers: tuple[Layer, ...]
) -> None:
    """Refuse to continue an output if its numbers would differ now.

    Raises:
        OutputError: naming what differs.
    """
    found = _differences(record.fingerprint, make_fingerprint(description))
    if layers != record.plan.layers:
        alike = tuple(replace(layer, unit_groups=1) for layer in layers) == record.plan.layers
        found.append(
            "units of a transposed convolution with groups: added up there, one per channel now"
            if alike
            else "the model's layers"
        )
    same_run = record.fingerprint.get("first checkpoint") == description.first_hash
    _refuse(
        out, found, "another analysis" if same_run else f"the analysis of another run, {record.run}"
    )


def check_same_losses(out: Place, record: Record, losses: Mapping[str, float]) -> None:
    """Refuse a loss that has changed although the fingerprint has not, as by a closed-over value.

    Raises:
        OutputError: naming the split.
    """
    exact = record.plan.settings.deterministic
    for split in record.plan.splits:
        there, here = split.first_loss, losses[split.name]
        same = there == here if exact else math.isclose(there or 0.0, here, rel_tol=1e-5)
        if not same and (there is not None or math.isfinite(here)):
            _refuse(out, [f"loss of {split.name!r} at the first step: {there} there, {here} now"])


def check_plan_fits(plan: Plan, description: Description) -> None:
    """Refuse a plan that was made for another model, other data or another kind of device.

    Raises:
        UsageError: naming what differs.
    """
    planned = [split.name for split in plan.splits]
    drawn = {s.name: (s.n_samples, s.drawn_from) for s in plan.splits if s.drawn_from}
    differences = {
        "layers": (plan.layers, description.layers),
        "splits": (planned, list(description.split_hashes)),
        "samples": (drawn, dict(description.drawn)),
        "device": (plan.device_kind, description.device_kind),
    }
    for name, (there, here) in differences.items():
        if there != here:
            raise UsageError(f"plan: made for other {name}; make a new plan for this task")


def check_plan_losses(plan: Plan, losses: Mapping[str, float]) -> None:
    """Refuse a plan that was made for another run or loss, or for other data of the same size.

    Raises:
        UsageError: naming the split.
    """
    for split in plan.splits:
        there, here = split.first_loss, losses[split.name]
        same = there is not None and math.isclose(there, here, rel_tol=1e-5)
        if not same and (there is not None or math.isfinite(here)):
            raise UsageError(
                f"plan: made for another run, loss or data: split {split.name!r} had a loss of "
                f"{there} at the first step, now {here}; make a new plan"
            )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} now"
        for name in sorted(there.keys() | here.keys())
        if _plain(there.get(name)) != _plain(here.get(name))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not set", True: "on", False: "off"}[value]
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "…"


def _refuse(out: Place, differences: list[str], what: str = "another analysis") -> None:
    if differences:
        raise OutputError(
            f"{out}: holds {what} ({'; '.join(differences)}); choose another --out, or "
            "ask for the same"
        )
