"""Whether workers compute the same: losses and gradients of a few samples at the first checkpoint.

A model may hold values that are in no state dict, such as random features in a plain tensor. If
workers' models differed in them, one table would contain two different losses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lcray.allocation.partial_sums import Site
from lcray.allocation.path import Point, Segment
from lcray.errors import DisagreementError
from lcray.execution.worker.workbench import Workbench
from lcray.planning.plan import Reference, SplitPlan
from lcray.tasks.layer import Layer

_SAMPLES = 16  # of each split, at most
_LOSS, _NORM = 1e-5, 1e-4  # relative: above the differences between kernels of processors
_NOISE = 1e-5  # of the norm of the whole gradient: smaller norms of layers are only rounding


def measure(bench: Workbench, point: Point) -> dict[str, Reference]:
    """Evaluate a few samples of every split at `point`; the model stays there.

    Raises:
        TaskError: if the task's loss fails or breaks the contract.
    """
    at = bench.placed(point)
    Site(Segment(at, at), 0.0).enter(bench.flat)
    out, count = bench.engine.new_vector(), bench.few(_SAMPLES)
    found = {}
    for number, source in enumerate(bench.sources):
        loss = bench.engine.evaluate_sample(bench.sample(number, count), out)
        norms = tuple(float(out[where].norm()) for where in bench.flat.slices)
        found[source.name] = Reference(loss, norms)
    return found


def with_reference(split: SplitPlan, found: Reference) -> SplitPlan:
    """`split` with the reference that the probing worker found; without it if it is not finite."""
    if not all(map(math.isfinite, (found.loss, *found.norms))):
        return split
    return replace(split, reference=found)


def check_agreement(
    splits: Iterable[SplitPlan], layers: Sequence[Layer], found: Mapping[str, Reference]
) -> None:
    """Refuse a worker that does not compute what the plan says.

    Raises:
        DisagreementError: if they differ; it says where.
    """
    for split in splits:
        own, planned = found[split.name], split.reference
        if planned is None:
            continue
        there, here = planned.loss, own.loss
        if not abs(there - here) <= _LOSS * abs(there):
            raise _error(f"split {split.name!r}: a loss of {here:.8g}, not {there:.8g}")
        noise = _NOISE * math.hypot(*planned.norms)
        for layer, there, here in zip(layers, planned.norms, own.norms, strict=True):
            if not abs(there - here) <= _NORM * there + noise:
                raise _error(
                    f"split {split.name!r}: a gradient of norm {here:.6g}, not {there:.6g}, for "
                    f"layer {layer.name!r}"
                )


def _error(what: str) -> DisagreementError:
    return DisagreementError(
        f"task: a worker differs from the worker that planned, at the same weights ({what}); "
        "model() and loss must be the same everywhere: seed what is random, or register it as a "
        "buffer"
    )


def digest(found: Mapping[str, Reference]) -> str:
    """A short name for the bits of `found`: another kind of processor may give other bits."""
    numbers = [(name, one.loss, one.norms) for name, one in sorted(found.items())]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]
