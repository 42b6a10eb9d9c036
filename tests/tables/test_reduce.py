from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import planting
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lcray.errors import CorruptionError, IncompleteError, OutputError
from lcray.tables.reducing import merge
from lcray.tables.reducing.fits import fit_weibulls
from lcray.tables.reducing.reduce import name_intervals, reduce, repack
from lcray.tables.schema import TABLES

REDUCED = [t for t in planting.ALL if t != "borders"]


def read(out: Path, table: str) -> pa.Table:
    return pq.ParquetFile(out / "tables" / f"{table}.parquet").read()


def assert_same(actual: pa.Table, expected: planting.Rows, table: str) -> None:
    """Same rows in the same order; floats to 1e-12, everything else exactly."""
    schema = TABLES[table].schema
    assert actual.schema.equals(schema)
    rows = actual.to_pylist()
    assert len(rows) == len(expected)
    for got, want in zip(rows, expected, strict=True):
        for field in schema:
            a, b = got[field.name], want.get(field.name)
            if pa.types.is_floating(field.type) and b is not None and a is not None:
                assert a == pytest.approx(b, rel=1e-12, abs=1e-15), (field.name, got)
            else:
                assert a == b, (field.name, got, want)


WORLDS = {
    "plain": {},
    "one span": {"spans": ((0, 2, 4, 6, 8, 10, 12),)},
    "a span an interval": {"spans": tuple((i, i + 2) for i in range(0, 12, 2))},
    "no node at 0": {"has_left": False},
    "bad interval at a border": {"bad": {("val", 6): "nonfinite_loss"}},
    "bad interval": {"bad": {("train", 2): "nonfinite_gradient", ("val", 10): "nonfinite_loss"}},
    "window across all": {"window": 100},
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("block", [7, merge.BLOCK])
@pytest.mark.slow
def test_tables_are_those_of_one_span(
    tmp_path: Path, name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge.Source, "__init__", _with_block(block))
    world = planting.make_world(**WORLDS[name])
    out = planting.write_output(tmp_path / "out", world)
    result = reduce(out)
    assert result.missing == ()
    for table in REDUCED:
        expected = planting.rows(world, table)
        assert_same(read(out, table), expected, table)
        assert result.rows[table] == len(expected)


def _with_block(block: int):
    """Source with blocks so small that layers are cut and streamed."""
    make = merge.Source.__init__

    def init(self, out, plan, commits):
        make(self, out, plan, commits, block)

    return init


def test_reduction_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    world = planting.make_world()
    outs = [
        planting.write_output(tmp_path / f"out{attempt}", world, attempt=attempt)
        for attempt in ("a0", "other")
    ]
    reduce(outs[0])
    first = {path.name: path.read_bytes() for path in (outs[0] / "tables").iterdir()}
    assert set(first) == {"manifest.json", *(f"{table}.parquet" for table in [*REDUCED, "fits"])}
    for out in outs:
        reduce(out)
        assert {path.name: path.read_bytes() for path in (out / "tables").iterdir()} == first


def test_fits_are_of_the_histograms_by_window_and_run(tmp_path: Path) -> None:
    world = planting.make_world()
    out = planting.write_output(tmp_path / "out", world)
    reduce(out)
    rows = read(out, "fits").to_pylist()
    histograms = planting.rows(world, "histograms")
    expected = []
    for split in world.plan.splits:
        for window in (-1, 0, 4, 8):
            found: dict[tuple[str, int], dict[int, int]] = {}
            for layer in world.plan.layers:
                for sign in (-1, 1):
                    bins: dict[int, int] = {}
                    for row in histograms:
                        here = (row["split"], row["layer"], row["sign"])
                        if here == (split.name, layer.name, sign) and window in (-1, row["window"]):
                            bins[row["bin"]] = bins.get(row["bin"], 0) + row["count"]
                    if bins:
                        found[layer.name, sign] = bins
            order = sorted({b for bins in found.values() for b in bins})
            counts = np.array([[bins.get(b, 0) for b in order] for bins in found.values()], float)
            fits = fit_weibulls(np.array(order, np.int64), counts)
            expected += [
                {
                    "split": split.name,
                    "window": window,
                    "layer": name,
                    "sign": sign,
                    "distribution": "weibull",
                    "parameter": parameter,
                    "value": value,
                    "se": se if parameter in ("k", "lambda") else None,
                }
                for (name, sign), fit in zip(found, fits, strict=True)
                for parameter, (value, se) in sorted(fit.items())
            ]
    assert len(expected) > 100
    assert_same(read(out, "fits"), expected, "fits")
    assert len(rows) < 2 * 4 * 4 * 2 * 6  # the buffer, for one, has none


def test_fits_of_layers_without_elements_are_empty(tmp_path: Path) -> None:
    scalar = (planting.LAYERS[3],)  # one element: too few for any fit in a window of one interval
    world = planting.make_world(spans=((0, 2),), layers=scalar)
    out = planting.write_output(tmp_path / "out", world)
    assert reduce(out).rows["fits"] == 0
    assert read(out, "fits").schema.equals(TABLES["fits"].schema)


def test_only_the_tables_of_the_plan(tmp_path: Path) -> None:
    world = planting.make_world(tables=("intervals", "layers", "borders"))
    out = planting.write_output(tmp_path / "out", world)
    assert set(reduce(out).rows) == {"intervals", "layers"}
    assert_same(read(out, "layers"), planting.rows(world, "layers"), "layers")


def test_missing_intervals_are_named_or_allowed(tmp_path: Path) -> None:
    world = planting.make_world(spans=((0, 2, 4), (4, 6), (6, 8), (8, 10), (10, 12)))
    out = tmp_path / "out"
    planting.write_analysis(out, world.plan)
    with pytest.raises(IncompleteError, match=r"6 of 6 intervals are missing: steps 0-12;"):
        reduce(out, allow_missing=True)
    present = [0, 3, 4]
    for i in present:
        planting.write_span(out, world, world.plan.spans[i])
    with pytest.raises(IncompleteError, match=r"2 of 6 intervals are missing: steps 4-8; "):
        reduce(out)
    assert not (out / "tables").exists()
    result = reduce(out, allow_missing=True)
    assert result.missing == ((4, 6), (6, 8))
    # What is there, with no flips across the gap: the two stretches, each as one span.
    ranges = (range(0, 2), range(4, 6))
    for table in ("intervals", "layers", "units", "groups"):
        rows = [row for r in ranges for row in planting.rows(world, table, r)]
        order = [split.name for split in world.plan.splits]
        rows.sort(key=lambda row: (order.index(row["split"]), row["start_step"]))
        assert_same(read(out, table), rows, table)
    parts = [planting.rows(world, "parameters", r) for r in ranges]
    keys = ("split", "layer", "index")
    total = [
        {key: a[key] if key in keys else a[key] + b[key] for key in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert_same(read(out, "parameters"), total, "parameters")


def test_a_step_that_two_spans_trace_appears_once(tmp_path: Path) -> None:
    world = planting.make_world()
    out = tmp_path / "out"
    planting.write_analysis(out, world.plan)
    for span in world.plan.spans:
        ts = planting.span_range(world, span)
        rows = planting.rows(world, "traces", ts)
        at_end = [
            row | {"lc": None}
            for row in planting.rows(world, "traces")
            if row["step"] == span.last and row not in rows
        ]
        order = [layer.name for layer in world.plan.layers]
        rows = sorted(
            rows + at_end,
            key=lambda r: (r["split"] != "val", order.index(r["layer"]), r["index"], r["step"]),
        )
        planting.write_span(out, world, span, rows={"traces": rows})
    reduce(out)
    assert_same(read(out, "traces"), planting.rows(world, "traces"), "traces")


@pytest.mark.parametrize(
    ("intervals", "text"),
    [
        ([(0, 2), (2, 4), (6, 8), (8, 10)], "0-4, 6-10"),
        ([(3, 4)], "3-4"),
        ([(4 * i, 4 * i + 1) for i in range(14)], ", 40-41, 44-45, and 2 more"),
    ],
)
def test_intervals_are_named_compactly(intervals: list[tuple[int, int]], text: str) -> None:
    assert name_intervals(intervals).endswith(text)


def test_rows_are_packed_into_full_row_groups() -> None:
    pieces = [pa.table({"a": pa.array(range(n), pa.int64())}) for n in (3, 0, 7, 1)]
    packed = list(repack(pieces, 4))
    assert [piece.num_rows for piece in packed] == [4, 4, 3]
    rows = pa.concat_tables(packed).column("a").to_pylist()
    assert rows == [*range(3), *range(7), 0]
    assert list(repack([], 4)) == []


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    out = planting.write_output(tmp_path / "out", planting.make_world())
    reduce(out)
    before = {path.name: path.read_bytes() for path in (out / "tables").iterdir()}
    (shard,) = out.glob("shards/00000006-00000008/units-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-8] + b"xxxxPAR1")
    with pytest.raises(CorruptionError, match="differs from its checksum"):
        reduce(out)
    assert {path.name: path.read_bytes() for path in (out / "tables").iterdir()} == before


def test_full_disk_keeps_the_tables(tmp_path: Path) -> None:
    out = planting.write_output(tmp_path / "out", planting.make_world())
    reduce(out)
    before = {path.name: path.read_bytes() for path in (out / "tables").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\)"):
            reduce(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (out / "tables").iterdir()} == before


def test_what_a_killed_reduction_left_is_removed(tmp_path: Path) -> None:
    out = planting.write_output(tmp_path / "out", planting.make_world())
    (out / "tables").mkdir()
    (out / "tables" / "layers-123.tmp").write_bytes(b"half")
    reduce(out)
    assert not list((out / "tables").glob("*.tmp"))


def test_no_output_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file; is this the output of an analysis"):
        reduce(tmp_path)


def _tampered(tmp_path: Path, table: str, change) -> Path:
    """An output whose middle span was written by a faulty worker."""
    world = planting.make_world()
    out = tmp_path / "out"
    planting.write_analysis(out, world.plan)
    for i, span in enumerate(world.plan.spans):
        rows = planting.rows(world, table, planting.span_range(world, span))
        if i == 1:
            rows = change(rows)
        planting.write_span(out, world, span, rows={table: rows})
    return out


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_borders_of_some_spans_only(tmp_path: Path, missing: int) -> None:
    world = planting.make_world(tables=tuple(t for t in planting.ALL if t != "parameters"))
    out = tmp_path / "out"
    planting.write_analysis(out, world.plan)
    for i, span in enumerate(world.plan.spans):
        planting.write_span(out, world, span, rows={"borders": []} if i == missing else None)
    name = world.plan.spans[missing].name
    with pytest.raises(CorruptionError, match=f"span {name} has no borders"):
        reduce(out)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("borders", lambda rows: [], "has no borders"),
        ("parameters", lambda rows: [r for r in rows if r["layer"] != "a.bias"], "lacks rows 0:5"),
        ("parameters", lambda rows: [r | {"index": 0} for r in rows], "not in order"),
        ("borders", lambda rows: [r | {"index": 0} for r in rows], "not in order"),
        ("intervals", lambda rows: [r | {"split": "test"} for r in rows], None),
        ("layers", lambda rows: [r | {"layer": "c"} for r in rows], "layer that the plan does not"),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, table: str, change, message: str | None) -> None:
    out = _tampered(tmp_path, table, change)
    if message is None:  # rows of a split that the plan lacks are left out; verify misses them
        assert reduce(out).rows["intervals"] == 2 * 5
        return
    with pytest.raises(CorruptionError, match=message):
        reduce(out)


def test_layers_without_borders_keep_their_flips(tmp_path: Path) -> None:
    tables = tuple(t for t in planting.ALL if t not in ("parameters", "borders"))
    world = planting.make_world(tables=tables)
    out = planting.write_output(tmp_path / "out", world)
    reduce(out)
    rows = [
        row
        for split in range(2)
        for span in world.plan.spans
        for row in planting.rows(world, "layers", planting.span_range(world, span))
        if row["split"] == world.plan.splits[split].name
    ]
    assert_same(read(out, "layers"), rows, "layers")


def test_a_loss_that_is_not_finite_in_the_plan(tmp_path: Path) -> None:
    world = planting.make_world(spans=((0, 2),))
    splits = tuple(replace(split, first_loss=None) for split in world.plan.splits)
    world.plan = replace(world.plan, splits=splits)
    assert reduce(planting.write_output(tmp_path, world)).rows["intervals"] == 2


def test_a_plan_without_the_tables_of_elements(tmp_path: Path) -> None:
    world = planting.make_world(tables=("intervals", "layers", "parameters", "elements", "traces"))
    out = tmp_path / "out"
    planting.write_analysis(out, world.plan)
    for span in world.plan.spans:  # an empty selection of layers: the tables have no rows
        nothing = {"parameters": [], "elements": [], "traces": []}
        planting.write_span(out, world, span, rows=nothing)
    rows = reduce(out).rows
    assert (rows["parameters"], rows["elements"], rows["traces"]) == (0, 0, 0)
    assert read(out, "parameters").schema.equals(TABLES["parameters"].schema)


def test_spans_that_read_different_checkpoints_are_not_merged(tmp_path: Path) -> None:
    world = planting.make_world()
    planting.write_analysis(tmp_path, world.plan)
    for span in world.plan.spans:
        digests = {8: "f" * 64} if span.last == 8 else {}
        planting.write_span(tmp_path, world, span, digests=digests)
    for allow_missing in (False, True):
        with pytest.raises(CorruptionError) as caught:
            reduce(tmp_path, allow_missing=allow_missing)
        assert str(caught.value) == (
            f"{tmp_path}: spans 00000006-00000008 and 00000008-00000012 read different "
            "checkpoints of step 8; analyze the run into a new output"
        )
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize(("factor", "refused"), [(1 + 1e-3, True), (1 + 1e-7, False)])
def test_spans_must_have_the_same_loss_where_they_meet(
    tmp_path: Path, factor: float, refused: bool
) -> None:
    """Workers with other models would put two losses of a step into one table."""
    world = planting.make_world()
    out = tmp_path / "out"
    planting.write_analysis(out, world.plan)
    for number, span in enumerate(world.plan.spans):
        rows = planting.rows(world, "intervals", planting.span_range(world, span))
        if number == 1:
            for row in rows:
                if row["start_step"] == span.first:
                    row["loss_start"] *= factor
        planting.write_span(out, world, span, rows={"intervals": rows})
    if refused:
        with pytest.raises(CorruptionError, match=f"at step {world.plan.spans[1].first} in the"):
            reduce(out)
    else:
        assert reduce(out).rows["intervals"] == 2 * 6
