"""What is shown: against own sums over the tables, and words worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import scenes
from console import shown

import lcray
from lcray.analyses.findings import Findings
from lcray.analyses.registry import FINDINGS
from lcray.analyses.titles import EMPTY, READING, WHAT_HAPPENED
from lcray.checkpoints.audit import Audit
from lcray.cli import terminal
from lcray.cli.display.audit import audit_table
from lcray.cli.display.findings import findings_summary
from lcray.cli.display.frames import fitted, frame_table, records
from lcray.cli.display.plan import plan_table
from lcray.cli.display.results import layer_table, summary, totals
from lcray.cli.units import duration, size
from lcray.execution.driver.analyze import PlanReport
from lcray.planning.costs import Estimate
from lcray.planning.plan import Plan


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "unknown"),
        (0.0, "0 s"),
        (59.6, "60 s"),
        (119.4, "119 s"),
        (119.7, "120 s"),
        (120, "2 min"),
        (150, "2 min"),
        (7140, "119 min"),
        (7200, "2 h 0 min"),
        (9030, "2 h 30 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_duration(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (123_456, "123 kB"),
        (1_500_000, "1.5 MB"),
        (999_999, "1 MB"),
        (999_499, "999 kB"),
        (99_950, "100 kB"),
        (7_250_000_000, "7.25 GB"),
        (3 * 10**15, "3,000 TB"),
    ],
)
def test_size(n_bytes: int | None, words: str) -> None:
    assert size(n_bytes) == words


def test_frames_show_missing_as_nothing_and_stop() -> None:
    frame = pd.DataFrame({"n": range(60), "x": [0.123456789, float("nan")] * 30, "s": ["a"] * 60})
    lines = shown(frame_table(frame)).splitlines()
    assert lines[0].split() == ["n", "x", "s"]
    assert lines[1].split() == ["0", "0.123457", "a"]
    assert lines[2].split() == ["1", "a"]
    assert len(lines) == 1 + 50 + 1
    assert lines[-1].strip() == "50 of 60 rows"
    frame = pd.DataFrame({"i": pd.array([1, None], "Int64"), "o": [None, "b"]})
    assert [line.split() for line in shown(frame_table(frame)).splitlines()[1:]] == [
        ["1"], ["b"],
    ]  # fmt: skip


def test_records() -> None:
    frame = pd.DataFrame(
        {
            "n": pd.array([2**53 + 1, None], "Int64"),
            "x": [1e-300, float("inf")],
            "s": pd.Categorical(["a", "b"]),
        }
    )
    assert records(frame) == [
        {"n": 2**53 + 1, "x": 1e-300, "s": "a"},
        {"n": None, "x": None, "s": "b"},
    ]


def test_layers_are_in_the_models_order_with_their_sums(plain_out: Path) -> None:
    results = lcray.open(plain_out)
    frame = results.layers()
    lines = [line.split() for line in shown(layer_table(results)).splitlines()]
    sizes = {"0.weight": 20, "0.bias": 5, "2.weight": 15, "2.bias": 3}
    assert [line[0] for line in lines[2:]] == list(sizes)
    assert "split train" in " ".join(lines[0])
    for name, *cells in lines[2:]:
        rows = frame[(frame["split"] == "train") & (frame["layer"] == name)]
        assert cells == [
            str(sizes[name]),
            f"{rows['lc'].sum():+.4f}",
            f"{rows['lc_helping'].sum():+.4f}",
            f"{rows['lc_hurting'].sum():+.4f}",
            f"{rows['n_helping'].sum() / (12 * sizes[name]):.1%}",
        ]


@pytest.mark.usefixtures("inline")
def test_totals_leave_out_what_has_no_lc(plain_run: Path, tmp_path: Path) -> None:
    """Loss change and LC are over the same intervals, or the gap would be nonsense."""
    import shutil

    from safetensors.torch import load_file, save_file

    run = shutil.copytree(plain_run, tmp_path / "run")
    tensors = load_file(scenes.checkpoint(run, 5))
    tensors["0.bias"][0] = float("nan")
    save_file(tensors, scenes.checkpoint(run, 5))
    results = lcray.analyze(run, "scenes:plain", tmp_path / "out", splits=["train"])
    good = results.intervals()
    good = good[good["status"] == "ok"]
    assert len(good) == 10
    (row,) = totals(results).to_dict("records")
    assert row["loss_change"] == pytest.approx((good["loss_end"] - good["loss_start"]).sum())
    assert row["lc"] == pytest.approx(good["lc"].sum())
    assert row["gap"] == pytest.approx((good["lc"] - good["loss_change"]).sum(), abs=1e-12)
    assert "2 intervals have no LC" in shown(summary(results))


@pytest.fixture
def plan(plain_out: Path) -> Plan:
    return lcray.open(plain_out).plan


def report(plan: Plan, **changes: Any) -> str:
    cost = Estimate(12, 56, 90.0, 2_000_000, {"intervals": 24, "layers": 1096}, 500_000_000)
    made = PlanReport(plan, replace(cost, **changes), 3, {"train": False, "val": True}, ("mind!",))
    return shown(plan_table(made))


def test_a_plan(plan: Plan) -> None:
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in report(plan).splitlines()}
    assert "intervals  12 in 4 spans of up to 3" in report(plan)
    assert "56 full-batch gradients" in rows["gradients"]
    assert "at least" not in rows["gradients"]
    assert rows["time"] == "time 90 s of gradients on 3 workers, and about 10 s to start them"
    assert rows["memory"] == "memory 500 MB per worker"
    assert rows["disk"] == "disk 2 MB"
    assert rows["layers"] == "layers 1,096"
    assert rows["dtype"] == "dtype float32"
    assert rows["data"] == "data train streamed, val resident"
    assert rows["device"] == "device cpu, 1 thread per worker"
    assert "mind!" in rows
    assert rows["BatchNorm"] == "BatchNorm running"


def test_batches_and_who_chose_them(plan: Plan) -> None:
    made = replace(plan, batch_size=64, memory_format="channels_last", threads=2)
    text = report(made)
    assert "up to 64 (automatic) samples, channels_last (automatic)" in text
    assert "cpu, 2 threads per worker" in text
    asked = replace(plan.settings, batch_size=64, memory_format="channels_last")
    assert "up to 64 samples, channels_last\n" in report(replace(made, settings=asked))


def test_batches_that_are_part_of_the_loss_are_nobodys_choice(plan: Plan) -> None:
    cost = Estimate(12, 56, 90.0, 2_000_000, {}, 500_000_000)
    text = shown(plan_table(PlanReport(plan, cost, 3, fixed_batches=True)))
    assert f"up to {plan.batch_size} samples, part of the loss, contiguous" in text


def test_refinement_makes_estimates_lower_bounds(plan: Plan) -> None:
    refined = replace(plan, settings=replace(plan.settings, refine=True))
    text = report(refined, seconds=None, is_least=True)
    assert "simpson with refinement" in text
    assert "at least 56 full-batch gradients" in text
    assert "at least unknown" in text


def test_what_a_plan_leaves_out_is_said(plan: Plan) -> None:
    train = replace(plan.splits[0], sorted_by_group=False)
    text = report(
        replace(
            plan,
            splits=(train, *plan.splits[1:]),
            tables=("intervals", "layers"),
            unit_layers=plan.unit_layers[1:],
            settings=replace(plan.settings, deterministic=False),
        )
    )
    assert f"groups of split 'train' mix within samples or batches: {len(train.groups)}" in text
    assert "no units for 0.weight: more than 10,000 units (--units for all)" in text
    assert "no parameters and traces tables: too many rows (--parameters forces them)" in text
    assert "deterministic algorithms off" in text
    assert "no units" not in report(plan)


def test_an_audit(plain_run: Path, tmp_path: Path) -> None:
    audit: Audit = lcray.inspect(plain_run)
    # 43 numbers of 4 bytes in each of 13 files, and the headers.
    assert audit.nbytes == sum(path.stat().st_size for path in plain_run.glob("*.safetensors"))
    text = shown(audit_table(audit))
    assert f"{plain_run}: 13 checkpoints, steps 0 to 12; 4 tensors" in text
    assert f"43 float elements, {size(audit.nbytes)}" in text
    assert text.splitlines()[-1] == "nothing stands out"


def test_a_summary_of_findings_names_each_and_where_all_its_rows_are(tmp_path: Path) -> None:
    rows = pa.table({"layer": [f"l{i}" for i in range(60)], "onset": [1] * 60})
    names = ("train", "other", "lc_train_after", "lc_other_after")
    for name in names:
        rows = rows.append_column(name, pa.array([name] * 60))
    rows = rows.replace_schema_metadata({"lcray.notes": "[]"})
    found = Findings(tmp_path, {"overfitting": rows}, {}, {})
    lines = shown(findings_summary(found)).splitlines()
    narrow = shown(findings_summary(found, 40)).splitlines()
    assert narrow[1].split() == ["train", "other", "layer", "onset"]
    assert narrow[26] == "and lc_train_after, lc_other_after"
    assert lines[0] == "When each layer starts to overfit (overfitting)"
    assert [line.split()[2] for line in lines[2:26]] == [f"l{i}" for i in range(24)]
    assert lines[26] == f"24 of 60 rows; all: {tmp_path}/overfitting.parquet"
    assert lines.count(WHAT_HAPPENED) == 1
    assert "not what would have happened without a layer" in WHAT_HAPPENED


def test_a_summary_says_what_an_empty_cell_means(tmp_path: Path) -> None:
    def lines(onsets: list[int | None], width: int = terminal.WIDE) -> list[str]:
        n = len(onsets)
        words = {name: ["x"] * n for name in ("train", "other", "layer")}
        after = pa.array([None if onset is None else -0.1 for onset in onsets], pa.float64())
        numbers = {"onset": pa.array(onsets, pa.int64()), "lc_train_after": after}
        rows = pa.table(words | numbers | {"lc_other_after": after})
        rows = rows.replace_schema_metadata({"lcray.notes": '["a note"]'})
        found = Findings(tmp_path, {"overfitting": rows}, {}, {})
        return shown(findings_summary(found, width)).splitlines()

    found = lines([None, 7])
    assert found[4].startswith("onset: the step from which, for three windows in a row")
    assert found[5:7] == ["no onset: none was found", "a note"]
    assert not any(line.startswith("no onset") for line in lines([3, 7]))
    assert not any(line.startswith("no onset") for line in lines([None], 20)), "it is not shown"


def test_words_on_findings_are_about_what_their_summaries_show() -> None:
    shown_columns = {finding.name: finding.shown for finding in FINDINGS if finding.brief}
    assert set(READING) <= set(shown_columns)
    for name, columns in EMPTY.items():
        assert set(columns) <= set(shown_columns[name]), name
    assert all(len(line) < 140 for line in READING.values())


def test_a_frame_too_wide_is_shown_value_by_value() -> None:
    frame = pd.DataFrame({"layer": ["a", "b", "c"], "lc": [-0.5, 0.123456789, 1.0]})
    assert shown(fitted(frame, 15)) == shown(frame_table(frame))  # 5 + 2 + 8 wide
    assert shown(fitted(frame, 14, rows=2)).split("\n\n") == [
        "layer  a\nlc     -0.5",
        "layer  b\nlc     0.123457",
        "2 of 3 rows",
    ]
