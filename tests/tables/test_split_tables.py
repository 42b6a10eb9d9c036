"""Rows of a span's shards, from checkpoints on disk, against the twin's numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scenes
import torch
from strategies import ConvNet, State, classify, labels, random_states
from torch import Tensor, nn
from twin import Interval, Twin, sign

import lcray
from lcray.allocation.interval import IntervalLC
from lcray.allocation.path import Point, Segment
from lcray.checkpoints import Recorder
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Plan, Span, SplitPlan
from lcray.settings import Settings
from lcray.tables.output import Output as Folder
from lcray.tables.schema import TABLES, table_schema
from lcray.tables.writing import row_groups, split_tables
from lcray.tables.writing.row_groups import ElementsWriter
from lcray.tables.writing.split_tables import SplitTables
from lcray.tasks.layer import Layer
from lcray.tasks.model.layout import Layout
from lcray.tasks.task import Task

STEPS = (0, 1, 2, 3, 4, 5)
SPLITS = {"train": 7, "val": 4}
# Agreement with the twin on the same nodes, relative to Σ|LC|.
CLOSE = 1e-10

Rows = list[dict[str, Any]]


class Net(ConvNet):
    """The convolutional net with a scalar, and its biases before BatchNorm frozen.

    Under batch statistics their gradients are 0, of which float64 leaves noise of either sign.
    """

    def __init__(self) -> None:
        super().__init__("tanh")
        self.gain = nn.Parameter(torch.ones(()))
        self.conv.bias.requires_grad_(False)
        self.fc.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


# The output axis of each layer with units: 1 for the transposed convolution's weight.
UNIT_AXIS = defaultdict(int, {"up.weight": 1})


def split_data(name: str) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(len(name))
    n = SPLITS[name]
    x = torch.randn(n, 1, 4, 4, generator=random, dtype=torch.float64)
    return x, torch.arange(n) % 3  # every group occurs, in unequal numbers


TASK = Task(Net, {name: split_data(name) for name in SPLITS}, classify, labels)


@cache
def states() -> tuple[State, ...]:
    return random_states(Net, 5, len(STEPS))


@cache
def twin_intervals(rule: str, mode: str) -> dict[tuple[str, int], Interval]:
    found = {}
    for split in SPLITS:
        data = split_data(split)
        n = SPLITS[split]
        chunks: list[Any] = [tuple(part[i : i + 1] for part in data) for i in range(n)]
        if mode == "batch":
            chunks = [data]  # one batch holds them all; their order is no part of the loss
        twin = Twin(Net, classify, chunks, labels, mode)
        for t in STEPS[:-1]:
            found[split, t] = twin.interval(states()[t], states()[t + 1], rule)
    return found


@dataclass
class Output:
    """The tables of each span, by span and table, and what they should say."""

    plan: Plan
    folders: list[Path]
    twin: dict[tuple[str, int], Interval]
    bad: frozenset[int]

    def rows(self, table: str, span: int | None = None) -> Rows:
        spans = range(len(self.folders)) if span is None else [span]
        found: Rows = []
        for i in spans:
            (path,) = self.folders[i].glob(f"{table}-*.parquet")
            read = pq.read_table(path)
            assert read.schema.names == table_schema(table).schema.names
            found += read.to_pylist()
        return found

    def intervals(self, span: int) -> list[int]:
        return [start for start, _ in self.plan.spans[span].intervals]

    def ok(self, start: int) -> bool:
        return start not in self.bad

    @property
    def names(self) -> list[str]:
        return list(self.twin["train", 0].lc)


def analyze(tmp_path: Path, *, poison: int | None = None, **options: Any) -> Output:
    """Record the states, plan two spans of 3 and 2 intervals, and work on both."""
    model = Net().double()
    run, out = tmp_path / "run", tmp_path / "out"
    for t, state in enumerate(states()):
        model.load_state_dict(state)
        if t == poison:
            with torch.no_grad():
                model.fc.weight[0, 0] = math.nan
        if t == 0:
            recorder = Recorder(model, run)
        else:
            recorder.step()
    recorder.close()
    chosen = make_settings(
        {"dtype": "float64", "elements": True, "window": 2, "batch_size": 8, **options}
    )
    workspace = Workspace(TASK, str(run), chosen)
    assert workspace.series.steps == STEPS
    plan = make_plan(
        STEPS, chosen, workspace.describe().layers, workspace.probe().splits, span_length=3
    )
    plan = replace(plan, trace_sample=3)
    # Spans in the other order: their results must not depend on it.
    for span in reversed(plan.spans):
        assert workspace.run(plan, span, out, "a").committed
    bad = frozenset() if poison is None else frozenset({poison - 1, poison})
    twin = twin_intervals(chosen.rule, chosen.batch_norm)
    return Output(plan, [Folder(out).span(span) for span in plan.spans], twin, bad)


@pytest.fixture(scope="module", params=["simpson", "gauss", "left", "batch", "poisoned"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Output:
    tmp_path = tmp_path_factory.mktemp(request.param)
    if request.param == "batch":
        return analyze(tmp_path, batch_norm="batch")
    if request.param == "poisoned":
        return analyze(tmp_path, poison=2)
    return analyze(tmp_path, rule=request.param)


def flat(tensor: Tensor) -> list[float]:
    return tensor.reshape(-1).tolist()  # type: ignore[no-any-return]


def close(found: float | None, expected: float | None, scale: float) -> bool:
    if found is None or expected is None:
        return found is expected
    return abs(found - expected) <= CLOSE * scale


def movement(name: str, t: int) -> list[float]:
    return flat(states()[t + 1][name] - states()[t][name])


def neighbours(output: Output, start: int) -> int | None:
    """The interval before, if it is in the same span and both are ok."""
    for span in range(len(output.folders)):
        starts = output.intervals(span)
        if start in starts[1:] and output.ok(start) and output.ok(start - 1):
            return start - 1
    return None


def test_the_twin_and_the_library_name_the_same_layers(output: Output) -> None:
    assert [layer.name for layer in output.plan.layers] == output.names
    assert len(output.names) == 15


def test_intervals(output: Output) -> None:
    rows = output.rows("intervals")
    keys = [(row["split"], row["start_step"]) for row in rows]
    assert keys == [(s, t) for span in (0, 1) for s in SPLITS for t in output.intervals(span)]
    gradients = {"simpson": 2, "gauss": 3, "left": 1}[output.plan.settings.rule]
    for row in rows:
        expected = output.twin[row["split"], row["start_step"]]
        assert row["end_step"] == row["start_step"] + 1
        assert row["rule"] == output.plan.settings.rule and row["panels"] == 1
        counts = (row["n_helping"], row["n_hurting"], row["n_zero"])
        if not output.ok(row["start_step"]):
            assert row["status"] == "nonfinite_checkpoint" and counts == (0, 0, 0)
            for name in ("lc", "gap", "loss_change", "first_order_lc", "converged"):
                assert row[name] is None, name
            assert row["loss_start"] is None and row["loss_end"] is None
            continue
        scale = expected.scale
        change = expected.loss_end - expected.loss_start
        assert row["status"] == "ok" and row["n_gradients"] == gradients
        assert close(row["loss_start"], expected.loss_start, 1)
        assert close(row["loss_end"], expected.loss_end, 1)
        assert close(row["loss_change"], change, 1)
        assert close(row["lc"], expected.total, scale)
        assert close(row["gap"], expected.total - change, scale)
        first = expected.first_order
        total = None if first is None else math.fsum(first.values())
        assert close(row["first_order_lc"], total, scale)
        assert row["converged"] is (abs(row["gap"]) <= 1e-3 * abs(row["loss_change"]))
        signs = Counter(
            sign(value)
            for name in output.names
            if "running" not in name
            for value in flat(expected.lc[name])
        )
        assert counts == (signs[-1], signs[1], signs[0])
        assert counts[2] == 6  # the frozen biases


def test_layers(output: Output) -> None:
    rows = output.rows("layers")
    expected_keys = [
        (split, t, name)
        for span in (0, 1)
        for split in SPLITS
        for t in output.intervals(span)
        for name in output.names
    ]
    assert [(row["split"], row["start_step"], row["layer"]) for row in rows] == expected_keys
    for row in rows:
        start, name = row["start_step"], row["layer"]
        expected = output.twin[row["split"], start]
        kind = "buffer" if "running" in name else "parameter"
        values = flat(expected.lc[name])
        assert (row["kind"], row["numel"], row["end_step"]) == (kind, len(values), start + 1)
        assert row["module"] == name.rpartition(".")[0]
        if not output.ok(start):
            for column in ("lc", "lc_error", "lc_helping", "lc_hurting", "first_order_lc"):
                assert row[column] is None
            assert row["n_helping"] == row["n_hurting"] == row["n_zero"] == row["n_flips"] == 0
            continue
        scale = expected.scale
        assert close(row["lc"], math.fsum(values), scale)
        assert close(row["lc_helping"], math.fsum(min(v, 0.0) for v in values), scale)
        assert close(row["lc_hurting"], math.fsum(max(v, 0.0) for v in values), scale)
        error = None if expected.error is None else expected.error[name]
        first = None if expected.first_order is None else expected.first_order[name]
        assert close(row["lc_error"], error, scale)
        assert close(row["first_order_lc"], first, scale)
        assert close(row["update_norm"], math.hypot(*movement(name, start)), 1)
        gradient = None
        if first is not None:
            gradient = math.hypot(*flat(expected.start_gradient[name]))
        assert close(row["gradient_norm"], gradient, 1)
        signs = Counter(sign(v) for v in values) if kind == "parameter" else Counter()
        counts = (row["n_helping"], row["n_hurting"], row["n_zero"])
        assert counts == (signs[-1], signs[1], signs[0])
        before, flips = neighbours(output, start), 0
        if before is not None and kind == "parameter":
            earlier = flat(output.twin[row["split"], before].lc[name])
            flips = sum(sign(a) * sign(b) == -1 for a, b in zip(earlier, values, strict=True))
        assert row["n_flips"] == flips
    assert sum(row["n_flips"] for row in rows) > 0


def test_units_are_slices_of_the_output_axis(output: Output) -> None:
    found = {
        (r["split"], r["start_step"], r["layer"], r["unit"]): r["lc"] for r in output.rows("units")
    }
    expected = {}
    for (split, t), interval in output.twin.items():
        if not output.ok(t):
            continue
        for name, lc in interval.lc.items():
            units = lc.unbind(UNIT_AXIS[name]) if lc.dim() else [lc]
            for unit, values in enumerate(units):
                key = (split, t, name, unit)
                expected[key] = math.fsum(flat(values))
                assert close(found.get(key), expected[key], interval.scale), key
    assert found.keys() == expected.keys()
    assert len([key for key in found if key[:3] == ("val", 4, "up.weight")]) == 2
    assert [key for key in found if key[2] == "gain" and key[:2] == ("val", 4)] == [
        ("val", 4, "gain", 0)
    ]


def test_elements_and_parameters_add_up_to_the_layers_of_kind_parameter(output: Output) -> None:
    """Buffers have LC of their own, in running mode: elements do not add up to intervals there."""
    kinds = {layer.name: layer.kind for layer in output.plan.layers}
    elements: dict[Any, list[float]] = defaultdict(list)
    for row in output.rows("elements"):
        assert kinds[row["layer"]] == "parameter"
        elements[row["split"], row["start_step"]].append(row["lc"])
    run: dict[str, list[float]] = defaultdict(list)
    for row in output.rows("parameters"):
        run[row["split"]].append(row["lc"])
    buffers = 0.0
    totals: dict[str, list[float]] = defaultdict(list)
    for (split, t), interval in output.twin.items():
        if output.ok(t):
            whole = math.fsum(interval.layer(n) for n in kinds if kinds[n] == "parameter")
            totals[split].append(whole)
            # float32 in the table
            assert abs(math.fsum(elements[split, t]) - whole) <= 2e-7 * interval.scale
            buffers = max(buffers, abs(interval.total - whole) / interval.scale)
    for split, values in totals.items():
        scale = sum(i.scale for (s, _), i in output.twin.items() if s == split)
        assert close(math.fsum(run[split]), math.fsum(values), scale)
    assert (buffers > 1e-3) == (output.plan.settings.batch_norm == "running")


class Grouped(nn.Module):
    """Transposed convolutions with groups, in one and in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.two = nn.ConvTranspose2d(6, 9, 2, groups=3, bias=False)
        self.fc = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:  # [n, 1, 4, 4]
        h = torch.tanh(self.one(x[:, 0, :, :3])).unflatten(2, (2, 2))
        return self.fc(torch.tanh(self.two(h)).mean((2, 3)))


def slices(module: nn.Module, x: Tensor) -> list[Tensor]:
    """For each output channel, where in the weight the elements are that it depends on."""
    found = []
    for channel in range(module.out_channels):
        module.zero_grad()
        module(x)[:, channel].square().sum().backward()
        found.append(module.weight.grad != 0)
    return found


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_units_of_grouped_transposed_convolutions_are_their_channels(
    tmp_path: Path, memory_format: str
) -> None:
    first, second = random_states(Grouped, 3, 2)
    model = Grouped().double()
    model.load_state_dict(first)
    with Recorder(model, tmp_path / "run") as recorder:
        model.load_state_dict(second)
        recorder.step()
    chosen = make_settings({"dtype": "float64", "memory_format": memory_format, "batch_size": 8})
    task = Task(Grouped, {"train": split_data("train")}, classify)
    workspace = Workspace(task, str(tmp_path / "run"), chosen)
    plan = make_plan((0, 1), chosen, workspace.describe().layers, workspace.probe().splits)
    plan = replace(plan, memory_format=memory_format)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    (span,) = plan.spans
    assert workspace.run(plan, span, tmp_path / "out", "a").committed
    (path,) = Folder(tmp_path / "out").span(span).glob("units-*.parquet")
    found = {(row["layer"], row["unit"]): row["lc"] for row in pq.read_table(path).to_pylist()}

    data = split_data("train")
    chunks = [tuple(part[i : i + 1] for part in data) for i in range(SPLITS["train"])]
    interval = Twin(Grouped, classify, chunks).interval(first, second, "simpson")
    model, expected = Grouped().double(), {}
    shapes = {"one": (2, 4, 3), "two": (2, 6, 2, 2)}
    for name, shape in shapes.items():
        lc, module = interval.lc[f"{name}.weight"], getattr(model, name)
        parts = slices(module, torch.rand(shape, dtype=torch.float64) + 1)
        assert torch.stack(parts).sum(dim=0).eq(1).all(), "every element has one output"
        for unit, part in enumerate(parts):
            expected[f"{name}.weight", unit] = math.fsum(flat(lc[part]))
    for name in ("one.bias", "fc.weight", "fc.bias"):
        for unit, values in enumerate(interval.lc[name]):
            expected[name, unit] = math.fsum(flat(values))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert close(found[key], value, interval.scale), key


def test_units_add_up_to_layers_and_layers_to_intervals(output: Output) -> None:
    units: dict[Any, list[float]] = defaultdict(list)
    layers: dict[Any, list[float]] = defaultdict(list)
    for row in output.rows("units"):
        units[row["split"], row["start_step"], row["layer"]].append(row["lc"])
    for row in output.rows("layers"):
        if row["lc"] is None:
            continue
        key = row["split"], row["start_step"]
        scale = output.twin[key].scale
        assert close(math.fsum(units[(*key, row["layer"])]), row["lc"], scale)
        layers[key].append(row["lc"])
    for row in output.rows("intervals"):
        if row["lc"] is not None:
            key = row["split"], row["start_step"]
            assert close(math.fsum(layers[key]), row["lc"], output.twin[key].scale)


def test_groups(output: Output) -> None:
    rows = output.rows("groups")
    keys = [(r["split"], r["start_step"], r["layer"], r["group"]) for r in rows]
    assert keys == [
        (split, t, name, group)
        for span in (0, 1)
        for split in SPLITS
        for t in output.intervals(span)
        if output.ok(t)
        for name in output.names
        for group in (0, 1, 2)
    ]
    totals: dict[Any, float] = defaultdict(float)
    for row in rows:
        interval = output.twin[row["split"], row["start_step"]]
        assert close(row["lc"], interval.groups[row["group"]][row["layer"]], interval.scale)
        share = interval.group_weights[row["group"]] / SPLITS[row["split"]]
        assert row["weight"] == pytest.approx(share, rel=1e-15)
        key = (row["split"], row["start_step"], row["layer"])
        totals[key] += row["lc"] * row["weight"]
    for (split, t, name), total in totals.items():
        interval = output.twin[split, t]
        assert close(total, interval.layer(name), interval.scale)


def test_parameters(output: Output) -> None:
    for span in (0, 1):
        starts = [t for t in output.intervals(span) if output.ok(t)]
        rows = output.rows("parameters", span)
        names = [name for name in output.names if "running" not in name]
        assert [(r["split"], r["layer"], r["index"]) for r in rows] == [
            (split, name, i)
            for split in SPLITS
            for name in names
            for i in range(states()[0][name].numel())
        ]
        for row in rows:
            split, name, i = row["split"], row["layer"], row["index"]
            scale = output.twin[split, 0].scale
            lc = {t: flat(output.twin[split, t].lc[name])[i] for t in starts}
            move = {t: movement(name, t)[i] for t in starts}
            slope = {t: flat(output.twin[split, t].start_gradient[name])[i] for t in starts}
            assert close(row["lc"], math.fsum(lc.values()), scale)
            assert close(row["abs_lc"], math.fsum(map(abs, lc.values())), scale)
            assert close(row["displacement"], math.fsum(move.values()), 1)
            assert close(row["path_length"], math.fsum(map(abs, move.values())), 1)
            signs = Counter(sign(v) for v in lc.values())
            counts = (row["n_helping"], row["n_hurting"], row["n_zero"])
            assert counts == (signs[-1], signs[1], signs[0])

            def flips(values: dict[int, float]) -> int:
                return sum(
                    sign(values[t]) * sign(values[t - 1]) == -1 for t in values if t - 1 in values
                )

            assert row["n_flips"] == flips(lc)
            assert row["displacement_flips"] == flips(move)
            has_left = output.plan.settings.rule != "gauss"
            assert row["gradient_flips"] == (flips(slope) if has_left else None)


def test_borders_hold_the_signs_of_the_first_and_the_last_interval(output: Output) -> None:
    has_left = output.plan.settings.rule != "gauss"
    for span in (0, 1):
        starts = output.intervals(span)
        for row in output.rows("borders", span):
            split, name, i = row["split"], row["layer"], row["index"]
            for end, t in (("first", starts[0]), ("last", starts[-1])):
                interval = output.twin[split, t]
                expected: list[int | None] = [
                    sign(flat(interval.lc[name])[i]),
                    sign(movement(name, t)[i]),
                    sign(flat(interval.start_gradient[name])[i]),
                ]
                if not output.ok(t):
                    expected = [0, 0, 0]
                if not has_left:
                    expected[2] = None
                found = [row[f"{what}_{end}"] for what in ("lc", "displacement", "gradient")]
                assert found == expected, (span, name, i, end)


def test_histograms(output: Output) -> None:
    for span in (0, 1):
        counts: Counter[Any] = Counter()
        sums: dict[Any, float] = defaultdict(float)
        for split in SPLITS:
            for t in output.intervals(span):
                for name in output.names:
                    if "running" in name or not output.ok(t):
                        continue
                    for value in flat(output.twin[split, t].lc[name]):
                        mantissa, exponent = math.frexp(abs(value))
                        # |value| = (2 mantissa) 2^(exponent - 1), in eighths of an octave.
                        which = (exponent - 1) * 8 + math.floor((2 * mantissa - 1) * 8)
                        key = (split, t // 2 * 2, name, sign(value), which if value else None)
                        counts[key] += 1
                        sums[key] += abs(value)
        found: Counter[Any] = Counter()
        for row in output.rows("histograms", span):
            exact_zero = row["sign"] == 0
            which = None if exact_zero else row["bin"]
            key = (row["split"], row["window"], row["layer"], row["sign"], which)
            found[key] += row["count"]
            assert row["sum"] == pytest.approx(sums[key], rel=1e-10)
            if not exact_zero:
                octave, part = divmod(row["bin"], 8)
                assert row["lower"] == math.ldexp(1 + part / 8, octave)
                assert row["upper"] == math.ldexp(1 + (part + 1) / 8, octave)
        assert found == counts
        assert any(key[3] == 0 for key in counts) is any(
            output.ok(t) for t in output.intervals(span)
        )


def test_elements(output: Output) -> None:
    rows = output.rows("elements")
    expected = [
        (split, name, t, i)
        for split in SPLITS
        for name in output.names
        if "running" not in name
        for t in STEPS[:-1]
        if output.ok(t)
        for i in range(states()[0][name].numel())
    ]
    found = {(r["split"], r["layer"], r["start_step"], r["index"]): r["lc"] for r in rows}
    assert len(found) == len(rows) and set(found) == set(expected)
    for (split, name, t, i), value in found.items():
        exact = flat(output.twin[split, t].lc[name])[i]
        assert value == pytest.approx(exact, rel=1e-6, abs=1e-12)  # float32: 6e-8


def test_traces(output: Output) -> None:
    has_left = output.plan.settings.rule != "gauss"
    chosen = {}
    for span in (0, 1):
        rows = output.rows("traces", span)
        by_layer: dict[Any, set[int]] = defaultdict(set)
        for row in rows:
            split, name, i, t = row["split"], row["layer"], row["index"], row["step"]
            by_layer[split, name].add(i)
            interval = output.twin[split, t]
            ok = output.ok(t)
            if t in output.bad and t - 1 in output.bad and (name, i) == ("fc.weight", 0):
                assert row["weight"] is None  # the NaN itself
            else:
                assert row["weight"] == flat(states()[t][name])[i]
            expected = flat(interval.lc[name])[i] if ok else None
            assert close(row["lc"], expected, interval.scale)
            slope = flat(interval.start_gradient[name])[i] if ok and has_left else None
            assert close(row["gradient"], slope, 1)
        steps = output.intervals(span)
        sizes = {key: len(indices) for key, indices in by_layer.items()}
        assert all(size == min(3, states()[0][name].numel()) for (_, name), size in sizes.items())
        assert len(rows) == sum(sizes.values()) * len(steps)
        assert {name for _, name in sizes} == {n for n in output.names if "running" not in n}
        keys = [
            (list(SPLITS).index(r["split"]), output.names.index(r["layer"]), r["index"], r["step"])
            for r in rows
        ]
        assert keys == sorted(keys)
        chosen[span] = dict(by_layer)
    assert chosen[0] == chosen[1]  # the sample is that of the run, not of a span
    assert all(chosen[0]["train", name] == chosen[0]["val", name] for _, name in chosen[0])


def test_named_elements_are_traced_besides_the_sample(tmp_path: Path) -> None:
    output = analyze(tmp_path, trace=("conv.weight:7", "fc.bias:2"), layers="fc.*")
    traced = defaultdict(set)
    for row in output.rows("traces"):
        traced[row["layer"]].add(row["index"])
    assert set(traced) == {"conv.weight", "fc.weight", "fc.bias"}
    assert traced["conv.weight"] == {7} and 2 in traced["fc.bias"]
    # The pattern narrows what is below layers, not the layers.
    for table in ("histograms", "parameters", "elements"):
        assert {row["layer"] for row in output.rows(table)} == {"fc.weight", "fc.bias"}
    units = {row["layer"] for row in output.rows("units")}
    assert units == {"fc.weight", "fc.bias"}
    assert {row["layer"] for row in output.rows("layers")} == set(output.names)
    # The counts of the interval still cover all parameters.
    size = sum(states()[0][n].numel() for n in output.names if "running" not in n)
    for row in output.rows("intervals"):
        assert row["n_helping"] + row["n_hurting"] + row["n_zero"] == size


def test_refined_intervals_say_so(tmp_path: Path) -> None:
    output = analyze(tmp_path, refine=True, rtol=1e-7, max_panels=8)
    rows = output.rows("intervals")
    assert {row["rule"] for row in rows} == {"simpson"}
    assert max(row["panels"] for row in rows) > 1
    for row in rows:
        assert row["n_gradients"] == 2 * row["panels"]
        bound = max(1e-7 * abs(row["loss_change"]), 1e-12 * rows[0]["loss_start"])
        assert row["panels"] == 8 or row["converged"]
        if row["converged"]:
            assert abs(row["gap"]) <= bound


class Hollow(nn.Module):
    """A linear map beside parameters without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.empty(0))
        self.rows = nn.Parameter(torch.empty(0, 3))
        self.inner = nn.Linear(4, 3)
        self.columns = nn.Parameter(torch.empty(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        nothing = self.none.sum() + self.rows.sum() + self.columns.sum()
        return self.inner(x) + nothing


@pytest.mark.usefixtures("inline")
def test_layers_without_elements_have_rows_of_zero(tmp_path: Path) -> None:
    task = Task(Hollow, scenes.points, scenes.cross_entropy, scenes.classes)
    run = scenes.record(task, tmp_path / "run", steps=4)
    results = lcray.analyze(run, task, tmp_path / "out", span_length=2, elements=True)
    result = lcray.verify(tmp_path / "out")
    assert result.ok, result.problems
    layers = results.layers()
    empty = layers[layers["layer"].isin(["none", "rows", "columns"])]
    assert len(empty) == 3 * len(layers[layers["layer"] == "inner.weight"])
    assert (empty["lc"] == 0).all()
    units = results.units()
    assert set(units[units["layer"] == "columns"]["unit"]) == {0, 1, 2}
    assert not set(units["layer"]) & {"none", "rows"}
    assert set(results.elements()["layer"]) == {"inner.weight", "inner.bias"}
    frame = results.intervals()
    total = layers.groupby(["split", "start_step"], observed=True)["lc"].sum()
    expected = frame.set_index(["split", "start_step"])["lc"]
    assert ((total - expected).abs() < 1e-12).all()


@pytest.mark.usefixtures("inline")
@pytest.mark.slow
def test_tables_do_not_depend_on_when_rows_are_written(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tables(name: str) -> dict[str, Any]:
        out = tmp_path / name
        results = lcray.analyze(plain_run, scenes.plain, out, span_length=5, elements=True)
        checked = lcray.verify(out)
        assert checked.ok, checked.problems
        return {table: getattr(results, table)() for table in ("layers", "units", "groups")}

    whole = tables("whole")
    few = {name: replace(table, row_group_size=3) for name, table in TABLES.items()}
    monkeypatch.setattr(row_groups, "TABLES", few)
    for table, frame in tables("pieces").items():
        assert len(frame) > 3 * 3 and frame.equals(whole[table])


class Collected:
    """Stands for the writer of the shards of one span: keeps the tables it is given."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.tables: dict[str, list[pa.Table]] = defaultdict(list)

    def write(self, table: str, data: pa.Table) -> None:
        assert len(data) <= TABLES[table].row_group_size
        self.tables[table].append(data)

    def rows(self, table: str) -> Rows:
        return [row for part in self.tables[table] for row in part.to_pylist()]


def synthetic_plan(
    shapes: list[tuple[int, ...]], intervals: int, memory_format: str = "contiguous"
) -> Plan:
    layers = tuple(Layer(f"layer{n}", "", "parameter", s, 0, True) for n, s in enumerate(shapes))
    names = tuple(layer.name for layer in layers)
    return Plan(
        settings=Settings(),
        layers=layers,
        splits=(SplitPlan("train", 1, 1, 1.0, 1.0, 1),),
        spans=(Span(tuple(range(intervals + 1))),),
        window=1000,
        tables=("intervals", "layers", "units", "histograms", "parameters", "traces", "elements"),
        unit_layers=names,
        detail_layers=names,
        trace_sample=4,
        memory_format=memory_format,
    )


def ok_interval(start: int, lc: Tensor, gradient: Tensor) -> IntervalLC:
    return IntervalLC(start, start + 1, "ok", 1.0, 1.0, "simpson", lc, start_gradient=gradient)


def tabulate(plan: Plan, points: list[Tensor], bad: tuple[int, ...] = ()) -> Collected:
    """The rows of a span along `points`, with random LC and gradients; all in rows' order."""
    layout, contiguous = Layout(plan.layers, plan.memory_format), Layout(plan.layers)
    at = [layout.places(n, np.arange(layer.numel)) for n, layer in enumerate(plan.layers)]
    places = torch.from_numpy(np.concatenate(at))

    def placed(vector: Tensor) -> Tensor:
        return torch.empty_like(vector).index_copy_(0, places, vector)

    random = torch.Generator().manual_seed(1)
    writer = Collected(plan.spans[0])
    with ElementsWriter(writer) as elements:  # type: ignore[arg-type]
        tables = SplitTables(plan, plan.splits[0], writer, elements)  # type: ignore[arg-type]
        for t in range(len(points) - 1):
            ends = (Point(t + i, placed(points[t + i]), {}) for i in (0, 1))
            lc = torch.randn(contiguous.size, generator=random, dtype=torch.float64)
            gradient = torch.randn(contiguous.size, generator=random)
            result = ok_interval(t, placed(lc), placed(gradient))
            if t in bad:
                result = IntervalLC(t, t + 1, "nonfinite_loss", math.nan, math.nan, "simpson")
            tables.add(result, Segment(*ends))
        tables.write(lambda step: placed(points[step]))
    return writer


def test_movement_is_that_of_the_intervals_that_are_ok() -> None:
    random = torch.Generator().manual_seed(0)
    points = [torch.randn(6, generator=random) for _ in range(8)]
    for point in points:
        point[0] = -math.inf  # it does not move
        point[1] = 0.25
    found = tabulate(synthetic_plan([(2, 3)], 7), points, bad=(0, 3, 4)).rows("parameters")
    for i, row in enumerate(found):
        values = [float(point[i]) for point in points]
        moves = [values[t + 1] - values[t] for t in (1, 2, 5, 6)] if i else [0.0]
        assert row["index"] == i
        assert abs(row["displacement"] - math.fsum(moves)) <= 1e-14
        assert abs(row["path_length"] - math.fsum(map(abs, moves))) <= 1e-14
        assert row["n_helping"] + row["n_hurting"] + row["n_zero"] == 4
    assert found[1]["displacement"] == found[1]["path_length"] == 0


def test_rows_by_element_do_not_depend_on_the_order_in_memory() -> None:
    shapes = [(3, 4, 2, 2), (5,), (2, 3, 2, 1, 2), (7, 2)]
    size = sum(math.prod(shape) for shape in shapes)
    random = torch.Generator().manual_seed(0)
    points = [torch.randn(size, generator=random) for _ in range(5)]
    formats = ("contiguous", "channels_last")
    plain, last = (tabulate(synthetic_plan(shapes, 4, f), points, bad=(2,)) for f in formats)
    for table in ("parameters", "borders", "traces", "elements"):
        assert len(plain.rows(table)) > size / 4
        assert last.rows(table) == plain.rows(table)


def test_large_layers_are_written_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: replace(table, row_group_size=10) for name, table in TABLES.items()}
    monkeypatch.setattr(split_tables, "TABLES", few)
    handed, put = [], ElementsWriter.put

    def watched(self: ElementsWriter, split: str, step: int, parts: Any) -> None:
        handed.append(sum(len(values) for _, _, values in parts))
        put(self, split, step, parts)

    monkeypatch.setattr(ElementsWriter, "put", watched)
    shapes = [(5, 5), (3,), (2,), (4, 5)]
    random = torch.Generator().manual_seed(0)
    points = [torch.randn(50, generator=random) for _ in range(4)]
    found = tabulate(synthetic_plan(shapes, 3), points)
    pieces = [10, 10, 5, 3, 2, 10, 10]
    assert [len(part) for part in found.tables["parameters"]] == pieces
    assert [len(part) for part in found.tables["borders"]] == pieces
    assert [len(part) for part in found.tables["elements"]] == pieces * 3
    assert handed == [10, 10, 5 + 3 + 2, 10, 10] * 3  # small layers together
    index = [i for shape in shapes for i in range(math.prod(shape))]
    assert [row["index"] for row in found.rows("parameters")] == index
    assert [row["index"] for row in found.rows("elements")] == index * 3
    assert max(len(part) for part in found.tables["traces"]) <= 10
    assert len(found.rows("traces")) == (4 + 3 + 2 + 4) * 3


def held_bytes(root: object) -> int:
    """Bytes of every array and tensor that can be reached from `root`, each counted once."""
    seen: set[int] = set()
    total, todo = 0, [root]
    while todo:
        item = todo.pop()
        while isinstance(item, np.ndarray) and item.base is not None:
            item = item.base
        if isinstance(item, Tensor):
            item = item.untyped_storage()
        key = item.data_ptr() if isinstance(item, torch.UntypedStorage) else id(item)
        if key in seen:
            continue
        seen.add(key)
        if isinstance(item, np.ndarray | torch.UntypedStorage):
            total += item.nbytes if isinstance(item, np.ndarray) else item.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set | deque):
            todo += item
        elif type(item).__module__.startswith("lcray."):
            names = getattr(type(item), "__slots__", ()) or vars(item)
            todo += [getattr(item, name) for name in names]
    return total


ELEMENT_BYTES = 23  # an element of the model, for the sums of a split
LAYER_BYTES = 32_000  # a layer, for its histograms and rows


@pytest.mark.parametrize("shapes", [[(1000, 1000)], [(100, 100)] * 100], ids=["one", "many"])
def test_a_split_holds_23_bytes_an_element(shapes: list[tuple[int, ...]]) -> None:
    plan = synthetic_plan(shapes, 255)
    plan = replace(plan, tables=tuple(t for t in plan.tables if t != "elements"))
    size = sum(math.prod(shape) for shape in shapes)
    random = torch.Generator().manual_seed(0)
    points = [torch.randn(size, generator=random) for _ in range(2)]
    writer = Collected(plan.spans[0])
    with ElementsWriter(writer) as elements:  # type: ignore[arg-type]
        tables = SplitTables(plan, plan.splits[0], writer, elements)  # type: ignore[arg-type]
        for t in range(3):
            segment = Segment(Point(t, points[t % 2], {}), Point(t + 1, points[1 - t % 2], {}))
            lc = torch.randn(size, generator=random, dtype=torch.float64)
            tables.add(ok_interval(t, lc, points[0]), segment)
        held = held_bytes(tables)
    assert held >= ELEMENT_BYTES * size  # else the count misses something
    assert held <= ELEMENT_BYTES * size + LAYER_BYTES * len(shapes) + 200_000


GROWTH = """
import sys
sys.path.append("..")  # what the tests share
import torch
from benchmarks.peaks import peak_bytes as peak
from test_split_tables import (
    Collected, ElementsWriter, Point, Segment, SplitTables, ok_interval, replace, synthetic_plan
)

n, width = int(sys.argv[1]), int(sys.argv[2])
plan = synthetic_plan([(width, width)] * n, 2)
plan = replace(plan, tables=tuple(t for t in plan.tables if t != "elements"))
writer = Collected(plan.spans[0])
writer.write = lambda table, data: None
warm = synthetic_plan([(400, 400)], 2)  # more than a block: blocks need memory of their own

def tabulate(plan):
    size = sum(layer.numel for layer in plan.layers)
    lc = torch.randn(size, dtype=torch.float64)
    points = [torch.randn(size) for _ in range(2)]
    start = peak()
    with ElementsWriter(writer) as elements:
        tables = SplitTables(plan, plan.splits[0], writer, elements)
        for t in range(2):
            segment = Segment(Point(t, points[t], {}), Point(t + 1, points[1 - t], {}))
            tables.add(ok_interval(t, lc, points[0]), segment)
        added = peak()
        tables.write(lambda step: points[step % 2])
    return added - start, peak() - added

tabulate(replace(warm, tables=plan.tables))
print(*tabulate(plan))
"""


@pytest.mark.parametrize(("n", "width"), [(1, 4000), (1225, 80)], ids=["one", "many"])
@pytest.mark.slow
def test_nothing_of_the_size_of_the_model_is_made_on_the_way(n: int, width: int) -> None:
    command = [sys.executable, "-c", GROWTH, str(n), str(width)]
    child = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent, check=True
    )
    added, written = map(int, child.stdout.split())
    size = n * width**2
    assert size > 7e6
    slack = 1.5 * size  # one more float32 vector would not fit
    assert added <= ELEMENT_BYTES * size + LAYER_BYTES * n + slack
    assert written <= 16 * size + 60e6  # the movement, and what a row group takes
