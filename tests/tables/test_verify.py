from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import planting
import pyarrow.parquet as pq
import pytest

from lcray.errors import CorruptionError
from lcray.storage.files import encode_json, read_sealed, seal
from lcray.tables.parquet import TableFile
from lcray.tables.reducing.reduce import reduce
from lcray.tables.schema import TABLES
from lcray.tables.verifying import coverage, sums
from lcray.tables.verifying.verify import verify

Row = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "o'ut"
    planting.write_reduced(out, planting.make_world())
    return out


def copied(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    "world",
    [
        {},
        {"has_left": False, "bad": {("val", 6): "nonfinite_loss", ("train", 0): "nonfinite_loss"}},
        {"tables": ("intervals", "layers", "borders")},
        {"spans": ((0, 1, 5), (5, 6)), "window": 100},
    ],
)
def test_a_sound_output_has_no_problems(tmp_path: Path, world: dict[str, Any]) -> None:
    made = planting.make_world(**world)
    out = planting.write_reduced(tmp_path, made)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = verify(out)
    assert result.problems == ()
    assert result.ok
    assert len(set(result.checks)) == len(result.checks)
    every = [*coverage.coverage(made.plan), *sums.invariants(made.plan)]
    possible = [c.name for c in every if {*c.tables} <= {*made.plan.tables, "fits"}]
    if "tables" not in world:
        assert len(possible) == len(every)
    assert [name for name in result.checks if name in {c.name for c in every}] == possible
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_output_that_is_not_reduced_yet(tmp_path: Path) -> None:
    world = planting.make_world()
    planting.write_analysis(tmp_path, world.plan)
    planting.write_span(tmp_path, world, world.plan.spans[0])
    planting.write_span(tmp_path, world, world.plan.spans[2])
    (shard,) = tmp_path.glob("shards/00000008-00000012/layers-*.parquet")
    shard.write_bytes(b"")
    result = verify(tmp_path)
    assert len(result.problems) == 3
    assert "layers-a0.parquet: 0 bytes, should be" in result.problems[0]
    assert "1 of 6 intervals are missing: steps 6-8" in result.problems[1]
    assert (
        f"has no tables yet; run the analysis again to finish it, or lcray reduce {tmp_path}"
        in result.problems[2]
    )


def test_no_output(tmp_path: Path) -> None:
    (problem,) = verify(tmp_path).problems
    assert "no such file" in problem


def test_incomplete_tables_are_sound_but_for_what_is_missing(tmp_path: Path) -> None:
    world = planting.make_world()
    planting.write_analysis(tmp_path, world.plan)
    planting.write_span(tmp_path, world, world.plan.spans[0])
    planting.write_span(tmp_path, world, world.plan.spans[2])
    reduce(tmp_path, allow_missing=True)
    (problem,) = verify(tmp_path).problems
    assert "steps 6-8" in problem
    planting.write_span(tmp_path, world, world.plan.spans[1])
    (problem,) = verify(tmp_path).problems
    assert "tables hold other spans than are committed (00000006-00000008)" in problem


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "grown": lambda content: content + b"\0",
    "flipped": lambda content: _flipped(content, len(content) // 2),  # of a record, in its plan
    "flipped at the end": lambda content: _flipped(content, len(content) - 9),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_parquet_file_is_found(sound: Path, tmp_path: Path, damage: str) -> None:
    out = copied(sound, tmp_path / "out")
    paths = sorted(out.rglob("*.parquet"))
    assert len(paths) == 3 * 12 + 12
    for path in paths:
        if DAMAGE[damage] is None:
            path.unlink()
        else:
            path.write_bytes(DAMAGE[damage](path.read_bytes()))
    problems = verify(out).problems
    for path in paths:
        assert len([p for p in problems if p.startswith(f"{path}: ")]) == 1
    assert len(problems) == len(paths)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["commit.json", "manifest.json", "analysis.json"])
def test_damaged_json_is_found(sound: Path, tmp_path: Path, damage: str, name: str) -> None:
    out = copied(sound, tmp_path / "out")
    path = sorted(out.rglob(name))[0]
    if DAMAGE[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    problems = verify(out).problems
    assert problems
    assert all("\n" not in problem for problem in problems)


def test_a_plan_that_changed_is_found(sound: Path, tmp_path: Path) -> None:
    out = copied(sound, tmp_path / "out")
    data = json.loads((out / "analysis.json").read_text())
    data["plan"]["settings"]["rtol"] = 0.5
    (out / "analysis.json").write_text(json.dumps(data))
    (problem,) = verify(out).problems
    assert "reduced by another plan" in problem


def test_spans_that_read_different_checkpoints(tmp_path: Path) -> None:
    world = planting.make_world()
    planting.write_analysis(tmp_path, world.plan)
    for span in world.plan.spans:
        digests = {8: "f" * 64} if span.last == 8 else {}
        planting.write_span(tmp_path, world, span, digests=digests)
    with pytest.raises(CorruptionError, match="different checkpoints of step 8"):
        reduce(tmp_path)
    problem = verify(tmp_path).problems[0]
    assert "00000006-00000008 and 00000008-00000012 read different checkpoints of step 8" in problem


def test_a_table_that_the_manifest_lacks(sound: Path, tmp_path: Path) -> None:
    out = copied(sound, tmp_path / "out")
    path = out / "tables" / "manifest.json"
    data = read_sealed(path)
    del data["tables"]["units"]
    path.write_bytes(encode_json(seal(data)))
    (problem,) = verify(out).problems
    assert "table 'units' is missing" in problem


def rewrite(out: Path, table: str, change: Callable[[list[Row]], list[Row]]) -> None:
    """Replaces the rows of a reduced table, with checksums that fit."""
    path = out / "tables" / f"{table}.parquet"
    rows = change(pq.ParquetFile(path).read().to_pylist())
    file = TableFile(path.with_name(uuid.uuid4().hex), TABLES[table])
    for start in range(0, len(rows), 50):  # several row groups: order is checked across them
        file.write(planting.as_table(table, rows[start : start + 50]))
    entry = file.finish()
    file.path.replace(path)
    manifest = out / "tables" / "manifest.json"
    data = read_sealed(manifest)
    data["tables"][table] = asdict(replace(entry, name=path.name))
    manifest.write_bytes(encode_json(seal(data)))


def at(row: int, **changes: Any) -> Callable[[list[Row]], list[Row]]:
    """Changes one row: a number is added, a function applied, anything else put in its place."""

    def change(rows: list[Row]) -> list[Row]:
        for name, value in changes.items():
            old = rows[row][name]
            if callable(value):
                rows[row][name] = value(old)
            elif isinstance(value, int | float) and old is not None:
                rows[row][name] = old + value
            else:
                rows[row][name] = value
        return rows

    return change


def without(row: int) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: rows[:row] + rows[row + 1 :]


def where(table_rows: list[Row], **values: Any) -> int:
    return next(
        i for i, row in enumerate(table_rows) if all(row[k] == v for k, v in values.items())
    )


def fits_n(rows: list[Row]) -> list[Row]:
    rows[where(rows, parameter="n")]["value"] += 1
    return rows


SMALL = 1e-9  # far below any LC, far above 1e-12 of it

#: What is broken: the table, the change, and the one check that must say so (others may, too).
BROKEN: dict[str, tuple[str, Callable[[list[Row]], list[Row]], str]] = {
    "loss change": (
        "intervals",
        at(3, loss_change=SMALL),
        "loss_change = loss_end - loss_start",
    ),
    "gap": ("intervals", at(3, gap=SMALL), "gap = lc - loss_change"),
    "gap unknown": ("intervals", at(3, gap=lambda _: None), "gap = lc - loss_change"),
    "less than its gradients": (
        "intervals",
        at(3, gradient_cost=lambda _: 0.5),
        "standard errors from sampling batches are possible",
    ),
    "a negative standard error": (
        "layers",
        at(2, lc_se=lambda _: -SMALL),
        "standard errors from sampling batches are possible",
    ),
    "a standard error without those of layers": (
        "intervals",
        at(3, lc_se=lambda _: -SMALL),
        "standard errors from sampling batches are possible",
    ),
    "loss at a border": (
        "intervals",
        at(3, loss_start=SMALL, loss_change=-SMALL, gap=SMALL),
        "loss_start = the previous interval's loss_end",
    ),
    "LC of an interval": (
        "intervals",
        at(3, lc=SMALL, gap=SMALL),
        "LC of layers adds up to that of intervals",
    ),
    "LC of a layer": ("layers", at(2, lc=SMALL), "LC of layers adds up to that of intervals"),
    "LC of a layer unknown": (
        "layers",
        at(2, lc=lambda _: None),
        "LC of layers adds up to that of intervals",
    ),
    "LC of a unit": ("units", at(2, lc=SMALL), "LC of units adds up to that of layers"),
    "LC of a group": ("groups", at(2, lc=SMALL), "weighted LC of groups adds up to that of layers"),
    "weight of a group": (
        "groups",
        at(2, weight=SMALL),
        "weighted LC of groups adds up to that of layers",
    ),
    "LC of a layer on a replicate": (
        "replicate_layers",
        at(2, lc=SMALL),
        "weighted LC of replicate_layers adds up to that of layers",
    ),
    "weight of a replicate": (
        "replicates",
        at(2, weight=SMALL),
        "LC and weight of replicates are those of replicate_layers",
    ),
    "LC of a replicate": (
        "replicates",
        at(2, lc=SMALL),
        "LC and weight of replicates are those of replicate_layers",
    ),
    "loss change of a replicate": (
        "replicates",
        at(2, loss_change=SMALL),
        "weighted losses of replicates add up to those of intervals",
    ),
    "loss of a replicate": (
        "replicates",
        at(2, loss_end=lambda _: None),
        "weighted losses of replicates add up to those of intervals",
    ),
    "the end of a replicate's interval": (
        "replicates",
        at(2, end_step=1),
        "weighted losses of replicates add up to those of intervals",
    ),
    "helping LC": ("layers", at(2, lc_helping=-SMALL), "lc_helping + lc_hurting = lc"),
    "helping and hurting LC exchanged": (
        "layers",
        lambda rows: [
            r | {"lc_helping": r["lc_hurting"], "lc_hurting": r["lc_helping"]} for r in rows
        ],
        "lc_helping + lc_hurting = lc",
    ),
    "a count of a layer": ("layers", at(2, n_zero=1), "n_helping + n_hurting + n_zero = numel"),
    "counts of a buffer": (
        "layers",
        at(1, n_zero=3),
        "n_helping + n_hurting + n_zero = numel",
    ),
    "more flips than elements": (
        "layers",
        at(2, n_flips=99),
        "n_helping + n_hurting + n_zero = numel",
    ),
    "a count of an interval": (
        "intervals",
        at(2, n_hurting=1, n_helping=-1),
        "counts of layers add up to those of intervals",
    ),
    "LC of a parameter": (
        "parameters",
        at(2, lc=SMALL),
        "parameters add up to layers of kind parameter over the run",
    ),
    "LC of a parameter unknown": (
        "parameters",
        at(2, lc=lambda _: None),
        "parameters add up to layers of kind parameter over the run",
    ),
    "absolute LC of a parameter": (
        "parameters",
        at(2, abs_lc=SMALL),
        "parameters add up to layers of kind parameter over the run",
    ),
    "a count of a parameter": (
        "parameters",
        at(2, n_zero=1),
        "parameters add up to layers of kind parameter over the run",
    ),
    "flips of a parameter": (
        "parameters",
        at(2, n_flips=1),
        "parameters add up to layers of kind parameter over the run",
    ),
    "flips of a layer": (
        "layers",
        at(4, n_flips=1),
        "parameters add up to layers of kind parameter over the run",
    ),
    "a count of a bin": (
        "histograms",
        at(2, count=1),
        "histograms add up to layers, window by window",
    ),
    "a sum of a bin": (
        "histograms",
        at(2, sum=SMALL),
        "histograms add up to layers, window by window",
    ),
    "a bin of nothing": (
        "histograms",
        lambda rows: [*rows, rows[-1] | {"window": 12}],
        "histograms add up to layers, window by window",
    ),
    "LC of an element": (
        "elements",
        at(2, lc=1e-6),
        "LC of elements adds up to that of layers of kind parameter",
    ),
    "n of a fit": ("fits", fits_n, "fits are of the histograms"),
    "an interval missing": (
        "intervals",
        without(3),
        "intervals has every split and interval once, and no other",
    ),
    "the end of an interval": (
        "intervals",
        at(3, end_step=1),
        "intervals has every split and interval once, and no other",
    ),
    "an interval too many": (
        "intervals",
        lambda rows: [*rows, rows[-1] | {"start_step": 12, "end_step": 14}],
        "intervals has every split and interval once, and no other",
    ),
    "a layer missing": (
        "layers",
        without(3),
        "layers has every split, interval and layer once, and no other",
    ),
    "a layer of another size": (
        "layers",
        at(3, numel=1, n_zero=1),
        "layers has every split, interval and layer once, and no other",
    ),
    "a unit missing": ("units", without(3), "units has every unit of a layer once"),
    "the last unit missing": ("units", without(2), "units has every unit of a layer once"),
    "a group missing": ("groups", without(3), "groups has every group of a layer or none"),
    "a replicate missing": ("replicates", without(3), "replicates has every replicate once"),
    "a layer missing on a replicate": (
        "replicate_layers",
        without(3),
        "replicate_layers has every replicate of a layer once",
    ),
    "Fisher information of a step missing": (
        "fisher",
        without(3),
        "fisher has every split, chosen step and trained layer once, and no other",
    ),
    "Fisher information below zero": (
        "fisher",
        at(2, trace_true=lambda _: -1.0),
        "traces of Fisher information are sums of squares",
    ),
    "an element missing": ("elements", without(3), "elements has every index of a layer once"),
    "a parameter missing": (
        "parameters",
        without(3),
        "parameters has every element of a layer once",
    ),
    "a layer's parameters missing": (
        "parameters",
        lambda rows: [row for row in rows if row["layer"] != "scale"],
        "parameters has every element of a layer once",
    ),
    "a traced step missing": (
        "traces",
        without(3),
        "traces has a sample of every layer, at every step",
    ),
    "a traced element missing": (
        "traces",
        lambda rows: [row for row in rows if (row["layer"], row["index"]) != ("a.bias", 0)],
        "traces has a sample of every layer, at every step",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_reported(sound: Path, tmp_path: Path, name: str) -> None:
    table, change, check = BROKEN[name]
    out = copied(sound, tmp_path / "out")
    rewrite(out, table, change)
    result = verify(out)
    assert not result.ok
    named = [problem for problem in result.problems if f"{out}: {check}: not so at" in problem]
    assert named, result.problems
    assert all("\n" not in problem for problem in result.problems)
    assert not [p for p in result.problems if "cannot be checked" in p]


def test_every_invariant_is_among_the_broken() -> None:
    plan = planting.make_world().plan
    every = [*coverage.coverage(plan), *sums.invariants(plan)]
    assert {check.name for check in every} == {check for _, _, check in BROKEN.values()}


def test_rewriting_alone_breaks_nothing(sound: Path, tmp_path: Path) -> None:
    out = copied(sound, tmp_path / "out")
    for table in TABLES:
        if table != "borders":
            rewrite(out, table, lambda rows: rows)
    assert verify(out).problems == ()


@pytest.mark.parametrize("how", ["twice", "exchanged", "exchanged between row groups"])
def test_rows_out_of_order(sound: Path, tmp_path: Path, how: str) -> None:
    out = copied(sound, tmp_path / "out")
    expected = []
    for table, schema in TABLES.items():
        if table == "borders":
            continue
        rows = pq.ParquetFile(out / "tables" / f"{table}.parquet").metadata.num_rows
        place = 49 if how == "exchanged between row groups" and rows > 50 else 5
        rewrite(out, table, twice(place) if how == "twice" else exchanged(place))
        key = ", ".join(schema.key)
        expected.append(
            f"{table}.parquet: row {place + 1} does not follow row {place} in the order of {key}"
        )
    problems = verify(out).problems
    for text in expected:
        assert [p for p in problems if text in p], problems


def twice(place: int) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [*rows[: place + 1], *rows[place:]]


def exchanged(place: int) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [*rows[:place], rows[place + 1], rows[place], *rows[place + 2 :]]


def test_many_violations_are_cut_short(sound: Path, tmp_path: Path) -> None:
    out = copied(sound, tmp_path / "out")
    rewrite(out, "units", lambda rows: [row | {"lc": 1.0} for row in rows])
    problems = verify(out).problems
    assert len(problems) == 3
    assert problems[-1].endswith("; and further rows")


def test_groups_of_other_passes_agree_less_closely(tmp_path: Path) -> None:
    world = planting.make_world()
    mixed = tuple(replace(split, sorted_by_group=False) for split in world.plan.splits)
    world.plan = replace(world.plan, splits=mixed)
    out = planting.write_reduced(tmp_path, world)
    rewrite(out, "groups", at(2, lc=lambda lc: lc * (1 + 1e-11)))
    assert verify(out).ok
    rewrite(out, "groups", at(2, lc=lambda lc: lc * (1 + 1e-5)))
    assert not verify(out).ok


def test_a_check_that_fails_is_a_problem(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = coverage.Invariant("wrong", ("layers",), "SELECT nothing FROM layers")
    monkeypatch.setattr("lcray.tables.verifying.verify.coverage", lambda plan: [wrong])
    (problem,) = verify(sound).problems
    assert "wrong: cannot be checked" in problem
    assert "\n" not in problem


def test_a_layer_that_the_plan_lacks(sound: Path, tmp_path: Path) -> None:
    out = copied(sound, tmp_path / "out")
    rewrite(out, "units", lambda rows: [*rows, rows[-1] | {"layer": "zz"}])
    (problem,) = verify(out).problems
    assert "units.parquet: row" in problem
    assert "does not follow" in problem
