"""Faults of a run, found before an analysis: one pass, with two states in memory."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from lcray.checkpoints import naming
from lcray.checkpoints.bits import count_unchanged, same_bits
from lcray.checkpoints.reading import State
from lcray.checkpoints.series import CheckpointSeries, open_series
from lcray.errors import CheckpointError, one_line, suggest
from lcray.storage import Place, PlaceLike

OUTLIER_Z = 6.0
OUTLIER_SPREAD = 0.15  # floor of the spread of log norms: a factor below 2.5 is never an outlier
OUTLIER_NEIGHBOURS = 5  # on each side
HIDDEN_SHARE = 0.1  # of the element updates of a low-precision tensor
IRREGULAR_SHARE = 0.2  # more gaps than this share of the intervals are reported as one
_CHUNK = 1 << 22  # elements


@dataclass(frozen=True)
class Finding:
    """One observation.

    Attributes:
        severity: ``"error"`` (the interval cannot be analyzed), ``"warning"`` or ``"info"``.
        kind: ``unreadable``, ``nonfinite``, ``names``, ``shape``, ``dtype``, ``start``, ``gap``,
            ``duplicate``, ``outlier``, ``low_precision`` or ``frozen``.
        step: the step it is about, or None for the whole run.
        layer: the tensor it is about, or None.
        message: one line.
    """

    severity: str
    kind: str
    step: int | None
    layer: str | None
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))


@dataclass(frozen=True)
class Audit:
    """What `inspect` found.

    Attributes:
        root: the run.
        steps: every step, whether readable or not.
        n_readable: checkpoints that could be read.
        n_tensors: number of tensors in the first readable checkpoint.
        n_elements: elements of its floating-point tensors.
        nbytes: bytes read.
        dtypes: dtype name to number of tensors, in the first readable checkpoint.
        frozen: floating-point tensors that never changed.
        findings: ordered by step; findings about the whole run come last.
    """

    root: Place
    steps: tuple[int, ...]
    n_readable: int
    n_tensors: int
    n_elements: int
    nbytes: int
    dtypes: dict[str, int]
    frozen: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no finding of severity ``"error"``."""
        return not any(finding.severity == "error" for finding in self.findings)


def inspect(run: PlaceLike, steps: str | None = None, layers: str | None = None) -> Audit:
    """Read every checkpoint of a run once and report what would disturb an analysis.

    A checkpoint that cannot be read is a finding, and the others are still read. Outliers are
    intervals whose update norm per step differs from its neighbours' by a robust z above 6 in the
    logarithm (median and 1.4826 times the median absolute deviation of up to five intervals on each
    side; the deviation is taken as at least 0.15).

    Args:
        run: a directory of checkpoints, or its URI.
        steps: ``"a:b"``, as in `open_series`.
        layers: a pattern such as ``"conv*"``: only tensors with a matching name are read.

    Raises:
        CheckpointError: no such run, no checkpoints in it, or no matching tensor.
        UsageError: `steps` is not a range.
    """
    series = open_series(run, steps, minimum=1)
    pass_ = _Pass()
    previous: State | None = None
    for step in series.steps:
        try:
            state = series.read(step)
        except CheckpointError as error:
            pass_.add("error", "unreadable", step, None, str(error))
            continue
        state = _narrowed(state, layers)
        pass_.visit(previous, state)
        previous = state
    findings = [*_start(series), *pass_.findings, *_gaps(series), *_outliers(pass_.norms)]
    findings += [*_nonfinite(pass_), *_hidden(pass_), *_frozen(pass_)]
    findings.sort(key=lambda found: math.inf if found.step is None else found.step)
    return _report(series, pass_, findings)


def _narrowed(state: State, pattern: str | None) -> State:
    if pattern is None:
        return state
    kept = {n: t for n, t in state.tensors.items() if naming.matches(n, pattern)}
    if not kept:
        raise CheckpointError(
            f"step {state.step}: " + suggest(pattern, state.tensors, "layer pattern")
        )
    return replace(state, tensors=kept)


def _report(series: CheckpointSeries, pass_: _Pass, findings: list[Finding]) -> Audit:
    return Audit(
        root=series.root,
        steps=series.steps,
        n_readable=pass_.n_readable,
        n_tensors=sum(pass_.dtypes.values()),
        n_elements=pass_.n_elements,
        nbytes=pass_.nbytes,
        dtypes=dict(pass_.dtypes),
        frozen=pass_.frozen,
        findings=tuple(findings),
    )


@dataclass
class _Track:
    """One floating-point tensor over the run: whether it moved, and its element updates of zero."""

    dtype: torch.dtype
    intervals: int = 0
    moved: bool = False
    updates: int = 0
    unchanged: int = 0


@dataclass
class _Pass:
    """Sums and findings collected while the checkpoints are read in order."""

    findings: list[Finding] = field(default_factory=list)
    norms: list[tuple[int, int, float]] = field(default_factory=list)
    tracks: dict[str, _Track] = field(default_factory=dict)
    nonfinite: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    dtypes: Counter[str] = field(default_factory=Counter)
    n_readable: int = 0
    n_elements: int = 0
    nbytes: int = 0

    def add(self, severity: str, kind: str, step: int, layer: str | None, message: str) -> None:
        self.findings.append(Finding(severity, kind, step, layer, message))

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(n for n, track in self.tracks.items() if track.intervals and not track.moved)

    def visit(self, before: State | None, after: State) -> None:
        self.n_readable += 1
        self.nbytes += after.nbytes
        if before is None:
            tensors = after.tensors.values()
            self.dtypes.update(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
            self.n_elements = sum(t.numel() for t in tensors if t.is_floating_point())
        self._check_finite(after)
        if before is not None:
            self._compare(before, after)

    def _check_finite(self, state: State) -> None:
        for name, tensor in state.tensors.items():
            if not tensor.is_floating_point() or name in self.nonfinite:
                continue
            wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 lacks isnan
            n_nan = int(torch.isnan(wide).sum())
            n_infinite = tensor.numel() - n_nan - int(torch.isfinite(wide).sum())
            if n_nan or n_infinite:
                self.nonfinite[name] = (state.step, n_nan, n_infinite)

    def _compare(self, before: State, after: State) -> None:
        self._compare_names(before, after)
        squares, same = 0.0, before.tensors.keys() == after.tensors.keys()
        moves: list[tuple[_Track, int, int]] = []
        for name in [name for name in after.tensors if name in before.tensors]:
            a, b = before.tensors[name], after.tensors[name]
            if not self._compare_form(name, a, b, after.step):
                same = False
                continue
            if not b.is_floating_point():
                same = same and same_bits(a, b)
                continue
            track = self.tracks.setdefault(name, _Track(b.dtype))
            track.intervals += 1
            unchanged = count_unchanged(a, b)
            if unchanged < b.numel():
                same, track.moved = False, True
                squares += _squared_distance(a, b)
            moves.append((track, b.numel(), unchanged))
        if same:
            self.add(
                "warning",
                "duplicate",
                after.step,
                None,
                f"step {after.step} holds the same bytes as step {before.step}: no movement",
            )
            return
        for track, updates, unchanged in moves:
            track.updates += updates
            track.unchanged += unchanged
        self.norms.append((before.step, after.step, math.sqrt(squares)))

    def _compare_names(self, before: State, after: State) -> None:
        for name in sorted(before.tensors.keys() ^ after.tensors.keys()):
            what = "is gone since" if name in before.tensors else "is new since"
            message = f"step {after.step}: tensor {name!r} {what} step {before.step}"
            self.add("error", "names", after.step, name, message)

    def _compare_form(self, name: str, a: torch.Tensor, b: torch.Tensor, step: int) -> bool:
        if a.shape != b.shape:
            message = f"step {step}: {name} changes shape from {list(a.shape)} to {list(b.shape)}"
            self.add("error", "shape", step, name, message)
        elif a.dtype != b.dtype:
            message = f"step {step}: {name} changes from {a.dtype} to {b.dtype}"
            self.add("error", "dtype", step, name, message)
        return a.shape == b.shape and a.dtype == b.dtype


def _squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    total = 0.0
    chunks = zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True)
    for before, after in chunks:  # in pieces, to avoid a float64 copy of a large tensor
        difference = after.double() - before.double()
        # inf - inf, at elements that stay infinite (masks), is not a movement
        total += float(difference.nan_to_num_(0.0, 0.0, 0.0).square_().sum())
    return total


def _nonfinite(pass_: _Pass) -> Iterator[Finding]:
    for name, (step, n_nan, n_infinite) in pass_.nonfinite.items():
        found = f"step {step}: {name} has {n_nan} NaN and {n_infinite} infinite elements"
        if n_nan == 0 and name in pass_.frozen:
            message = f"{found}, and never changes (a mask)"
            yield Finding("info", "nonfinite", step, name, message)
        else:
            message = f"{found}, for the first time"
            yield Finding("error", "nonfinite", step, name, message)


def _start(series: CheckpointSeries) -> Iterator[Finding]:
    if series.late_start is not None:
        yield Finding("warning", "start", series.steps[0], None, series.late_start)


def _gaps(series: CheckpointSeries) -> Iterator[Finding]:
    intervals = [(a, b, b - a) for a, b in pairwise(series.steps)]
    if not intervals:
        yield Finding("warning", "gap", None, None, "one checkpoint; an analysis needs at least 2")
    if len(intervals) < 2:
        return
    usual, _ = Counter(width for _, _, width in intervals).most_common(1)[0]
    odd = [interval for interval in intervals if interval[2] != usual]
    if len(odd) > max(3, IRREGULAR_SHARE * len(intervals)):
        widths = [width for _, _, width in intervals]
        message = (
            f"checkpoints are {min(widths)} to {max(widths)} steps apart; "
            f"{len(odd)} of {len(intervals)} intervals differ from the usual {usual}"
        )
        yield Finding("warning", "gap", None, None, message)
        return
    for a, b, width in odd:
        message = f"steps {a} to {b} are {width} apart, where {usual} is usual"
        yield Finding("warning", "gap", a, None, message)


def _outliers(norms: Sequence[tuple[int, int, float]]) -> Iterator[Finding]:
    moved = [(a, b, norm / (b - a)) for a, b, norm in norms if norm > 0 and math.isfinite(norm)]
    logs = [math.log(norm) for _, _, norm in moved]
    for i, (a, b, norm) in enumerate(moved):
        near = logs[max(0, i - OUTLIER_NEIGHBOURS) : i] + logs[i + 1 : i + 1 + OUTLIER_NEIGHBOURS]
        if len(near) < OUTLIER_NEIGHBOURS:
            continue
        middle = statistics.median(near)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in near)
        z = (logs[i] - middle) / max(spread, OUTLIER_SPREAD)
        if abs(z) > OUTLIER_Z:
            message = (
                f"steps {a} to {b}: update norm {norm:.3g} per step is "
                f"{math.exp(logs[i] - middle):.3g} times that of its neighbours (robust z {z:.1f})"
            )
            yield Finding("warning", "outlier", b, None, message)


def _hidden(pass_: _Pass) -> Iterator[Finding]:
    for name, track in pass_.tracks.items():
        if track.dtype.itemsize > 2 or not track.moved:
            continue
        share = track.unchanged / track.updates
        if share > HIDDEN_SHARE:
            dtype = str(track.dtype).removeprefix("torch.")
            message = (
                f"{name} is stored in {dtype}, and {share:.0%} of its element updates are zero: "
                "small updates round away; record in float32"
            )
            yield Finding("warning", "low_precision", None, name, message)


def _frozen(pass_: _Pass) -> Iterator[Finding]:
    for name in pass_.frozen:
        yield Finding("info", "frozen", None, name, f"{name} never changes")
