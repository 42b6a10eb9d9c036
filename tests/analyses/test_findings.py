"""The framework: windows, the verb, its files, and what it says of findings that cannot be had."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import numpy as np
import planting
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from repository import DOCS

import lcray
from lcray.analyses import findings
from lcray.analyses.findings import Findings
from lcray.analyses.registry import FINDINGS, Finding
from lcray.analyses.series import layer_series
from lcray.analyses.windows import Window, Windows
from lcray.cli.app import app
from lcray.errors import InapplicableError, OutputError, UsageError
from lcray.storage import place, storage_of

WORLD = planting.with_a_gap()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.write_reduced(tmp_path_factory.mktemp("findings") / "out", WORLD)


@pytest.fixture(scope="module")
def found(out: Path) -> Findings:
    return lcray.findings(out)


STEPS = (0, 2, 4, 6, 8, 10, 12)


def test_an_interval_is_in_the_window_that_its_start_is_in() -> None:
    run, low, high = Windows.whole(STEPS) + Windows.fixed(STEPS, 7)
    assert (run, low, high) == (Window("run", 0, 12), Window("0:7", 0, 7), Window("7:14", 7, 14))
    starts = np.array(STEPS[:-1])
    assert run.holds(starts).all()
    assert starts[low.holds(starts)].tolist() == [0, 2, 4, 6]
    assert starts[high.holds(starts)].tolist() == [8, 10]
    first, second, _ = Windows.fixed(STEPS, 4)
    assert [starts[w.holds(starts)].tolist() for w in (first, second)] == [[0, 2], [4, 6]]


def test_windows_without_intervals_are_left_out_and_named_ones_are_refused() -> None:
    assert [w.name for w in Windows.fixed((0, 1, 9, 10), 3)] == ["0:3", "9:12"]
    assert [w.name for w in Windows.fixed(STEPS, 3)] == ["0:3", "3:6", "6:9", "9:12"]
    named = Windows.named(STEPS, {"early": ":5", "late": "5:", "all": ":"})
    assert [(w.first, w.end) for w in named] == [(0, 5), (5, 12), (0, 12)]
    with pytest.raises(UsageError, match="no interval starts in 12:20"):
        Windows.named(STEPS, {"after": "12:20"})
    for text in ("5", "a:b", "-1:3", ""):
        with pytest.raises(UsageError, match="not a range"):
            Windows.named(STEPS, {"odd": text})
    for text in (f"{2**63}:", "0:" + "9" * 5000):
        with pytest.raises(UsageError, match=r"steps end at 2\*\*63"):
            Windows.named(STEPS, {"odd": text})
    with pytest.raises(UsageError, match="another name"):
        Windows.named(STEPS, {"run": "0:2"})
    with pytest.raises(UsageError, match="at least 1"):
        Windows.fixed(STEPS, 0)


def test_without_a_wish_windows_are_those_of_the_analysis(out: Path) -> None:
    results = lcray.open(out)
    assert [w.name for w in Windows.of(results)] == ["run", "0:4", "4:8", "8:12"]
    assert [w.name for w in Windows.of(results, windows={"x": "0:4"})] == ["run", "x"]
    assert [w.name for w in Windows.of(results, 6, {"x": "0:4"})] == ["run", "0:6", "6:12", "x"]
    with pytest.raises(UsageError, match="two windows have this name"):
        Windows.of(results, 6, {"0:6": "0:4"})


def test_series_hold_what_was_planted(out: Path) -> None:
    series = layer_series(lcray.open(out), ["update_norm"])
    assert series.splits == ("val", "train")
    assert series.layers == ("b.weight", "a.bias", "scale")
    assert series.starts.tolist() == [0, 2, 4, 6, 8, 10]
    assert series.ok.tolist() == [[True, True, True, False, True, True], [True] * 6]
    for k, name in enumerate(series.layers):
        planted = WORLD.lc["train", name].sum(axis=1)
        assert series["lc"][1, :, k] == pytest.approx(planted, rel=1e-12)
    assert np.isnan(series["lc"][0, 3]).all()


@pytest.mark.slow
def test_findings_are_stored_as_they_are_returned_and_the_same_again(out: Path) -> None:
    found = lcray.findings(out)
    assert [*found] == [f.name for f in FINDINGS if f.name not in found.impossible]
    paths = {name: out / "findings" / f"{name}.parquet" for name in found}
    first = {name: path.read_bytes() for name, path in paths.items()}
    for name, path in paths.items():
        stored = pq.read_table(path)
        assert stored.equals(found[name])
        metadata = stored.schema.metadata
        assert metadata[b"lcray.finding"].decode() == name
        assert metadata[b"lcray.format_version"] == b"2"
        assert metadata[b"lcray.seed"] == b"0"
        json.loads(metadata[b"lcray.parameters"])
        entry = json.loads((out / "tables" / "manifest.json").read_text())["tables"]
        used = json.loads(metadata[b"lcray.tables"])
        assert used and all(entry[table]["sha256"] == digest for table, digest in used.items())
        for field in stored.schema:
            assert field.metadata and set(field.metadata) == {b"unit", b"description"}, field
        key = metadata[b"lcray.key"].decode().split(",")
        rows = stored.select(key).to_pylist()
        assert len({tuple(row.values()) for row in rows}) == len(rows), f"{name}: a key twice"
    lcray.findings(out)
    assert first == {name: path.read_bytes() for name, path in paths.items()}
    assert [p.name for p in (out / "findings").iterdir() if p.suffix != ".parquet"] == []


def test_findings_of_an_output_in_an_object_store_are_the_same(out: Path) -> None:
    there = place(f"memory://{uuid.uuid4().hex}/out")
    for path in [out / "analysis.json", *(out / "tables").iterdir()]:
        target = there / path.relative_to(out).as_posix()
        storage_of(target).write(target, path.read_bytes())
    names = ("shares", "habits", "first_order")  # by Arrow, by SQL, and by pandas
    lcray.findings(out, only=names)
    found = lcray.findings(str(there), only=names)
    assert sorted(found) == sorted(names)
    for name in found:
        stored = storage_of(found.path).read(found.path / f"{name}.parquet")
        assert stored == (out / "findings" / f"{name}.parquet").read_bytes()


def test_what_cannot_be_had_says_what_would_give_it(tmp_path: Path) -> None:
    tables = ("intervals", "layers", "units")
    out = planting.write_reduced(tmp_path, planting.make_world(tables=tables))
    found = lcray.findings(out)
    needy = {f.name for f in FINDINGS if not set(f.needs) <= set(tables)}
    assert needy <= set(found.impossible)
    assert not needy & set(found)
    for name in needy:
        assert "there is no table" in found.impossible[name]
        assert "analyze" in found.impossible[name]
        with pytest.raises(InapplicableError, match=f"{name}: there is no table"):
            lcray.findings(out, only=[name])


def test_refusals(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'first_order'"):
        lcray.findings(out, only=["first_ordr"])
    with pytest.raises(UsageError, match="seed -1"):
        lcray.findings(out, seed=-1)
    with pytest.raises(OutputError):
        lcray.findings(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_write_that_fails_leaves_the_old_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = out / "findings" / "first_order.parquet"
    lcray.findings(out, only=["first_order"])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lcray.storage.local._write_synced", full)
    with pytest.raises(OutputError, match="No space left"):
        findings.findings(out, only=["first_order"], seed=3)
    assert path.read_bytes() == before
    assert len([*path.parent.glob("first_order*")]) == 1


def test_a_link_out_of_the_output_is_not_followed(tmp_path: Path) -> None:
    path = planting.write_reduced(tmp_path / "out", WORLD)
    (tmp_path / "elsewhere").mkdir()
    (path / "findings").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="leads out of"):
        lcray.findings(path)
    assert [*(tmp_path / "elsewhere").iterdir()] == []


EXPLAINED = (DOCS / "findings.md").read_text()


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda f: f.name)
def test_every_finding_is_explained_with_its_columns(finding: Finding, found: Findings) -> None:
    section = EXPLAINED.split(f"## `{finding.name}`\n")[1].split("\n## ")[0]
    assert ("Needs" in section and "Read: " in section) or finding.name == "memorising"
    assert all(f"`{table}`" in section for table in finding.needs)
    listed = re.findall(r"`(\w+)`", section.split("Columns: ")[1].split("\n\n")[0])
    if finding.name in found:
        assert listed == found[finding.name].column_names
        assert set(finding.shown) <= set(listed)


def test_the_command_prints_what_there_is(out: Path, found: Findings) -> None:
    shown = CliRunner().invoke(app, ["findings", str(out)])
    assert (shown.exit_code, shown.stderr) == (0, "lcray: findings 0/17\n")
    for finding in FINDINGS:
        if finding.name in found:
            assert (finding.title in shown.output) == finding.brief
        else:
            assert f"no {finding.name}: {found.impossible[finding.name]}" in shown.output
    assert str(out / "findings") in shown.output
    assert "windows of 4 steps hold fewer than 8 intervals" in shown.output  # a note


def test_the_command_for_scripts(out: Path) -> None:
    arguments = ["findings", str(out), "--only", "shares", "--window", "6", "--seed", "4", "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    data = json.loads(shown.stdout)
    assert data["path"] == str(out / "findings") and data["impossible"] == {}
    (name, rows), *more = data["findings"].items()
    assert name == "shares" and not more
    assert {row["window"] for row in rows if row["resolution"] != "interval"} == {
        "run",
        "0:6",
        "6:12",
    }
    stored = pq.read_table(out / "findings" / "shares.parquet")
    assert stored.schema.metadata[b"lcray.seed"] == b"4"
    assert len(rows) == stored.num_rows


@pytest.mark.parametrize("text", ["early", "a=0:2,a=2:4", ""])
def test_the_command_refuses_windows_without_form(text: str, out: Path) -> None:
    shown = CliRunner().invoke(app, ["findings", str(out), "--windows", text])
    assert shown.exit_code == 2
    assert "name=a:b" in shown.stderr
