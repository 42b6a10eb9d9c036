"""The command line: what it prints, where, and how it exits; and what happens on a signal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import scenes
import torch
from console import PROGRESS, Lcray, Ran
from safetensors.torch import load_file, save_file

import lcray
from lcray.cli import app
from lcray.execution.driver.status import FailedSpan, Status
from lcray.execution.worker.reports import RunningSpan
from lcray.tasks.task import Task

PROGRAM = [sys.executable, "-m", "lcray"]


def test_help_of_every_command(command: Lcray) -> None:
    names = set(app.app.commands)
    assert {"demo", "inspect", "plan", "analyze", "status", "reduce", "verify", "query"} <= names
    top = command("--help")
    assert top.code == 0
    for name in names:
        shown = command(name, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert f"lcray {name}" in shown.out
        assert name in top.out
        for option in app.app.commands[name].params:
            assert all(flag in shown.out for flag in option.opts if flag.startswith("--"))
            if option.opts[0].startswith("--"):
                assert getattr(option, "help", None), (name, option.opts)
    assert command("-h").out == top.out


def test_version(command: Lcray) -> None:
    assert command("--version") == Ran(0, f"lcray, version {lcray.__version__}\n", "")


def test_no_command_shows_the_help(command: Lcray) -> None:
    shown = command()
    assert shown.code == 2
    assert "lcray analyze RUN" in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyse"], "No such command 'analyse'"),
        (["inspect"], "Missing argument 'RUN'"),
        (["plan", "RUN"], "Missing option '--task'"),
        (["analyze", "RUN", "--task", "scenes:plain"], "Missing option '--out'"),
        (["analyze", "RUN", "--reul", "left"], "No such option '?--reul'?.*--rule"),
        (["plan", "RUN", "--task", "scenes:plain", "--workers", "two"], "not a valid integer"),
        (["plan", "RUN", "--task", "scenes:plain", "--resource", "slot"], "the form name=amount"),
        (["plan", "RUN", "--task", "scenes:plain", "--resource", "slot=x"], "form name=amount"),
        (["query", "OUT", "SELECT 1", "--format", "xml"], "'xml' is not one of"),
    ],
)
def test_usage_that_click_refuses(arguments: list[str], message: str, command: Lcray) -> None:
    found = command(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert re.search(message, found.err, re.IGNORECASE)
    assert "Traceback" not in found.err


REFUSALS: list[tuple[list[str], int, str]] = [
    (["--rule", "simson"], 2, "unknown rule 'simson': did you mean 'simpson'?"),
    (["--split", "trian"], 2, "unknown split 'trian': did you mean 'train'?"),
    (["--layers", "2.wieght"], 2, "unknown layer '2.wieght': did you mean '2.weight'?"),
    (["--rule", "left", "--refine"], 2, "rule 'left': cannot be refined"),
    (["--trace", "0.weight:99"], 2, "trace '0.weight:99': the layer has 20 elements"),
    (["--batch-size", "0"], 2, "batch-size 0: must be at least 1"),
    (["--memory-format", "chanels_last"], 2, "did you mean 'channels_last'?"),
    (["--memory", "0"], 2, "memory 0: must be positive, in GiB"),
    (["--steps", "5"], 2, "steps '5'"),
    (["--steps", "4:4"], 1, "one checkpoint|needs two|1 checkpoint"),
    (["--task", "scenes"], 2, "task 'scenes': must have the form package.module:attribute"),
    (["--task", "no_such_module:task"], 1, "task module 'no_such_module': cannot be imported"),
    (["--task", "scenes:plian"], 1, "unknown attribute 'plian': did you mean 'plain'?"),
    (["--task", "nowhere.py:task"], 1, r"task file .*/nowhere\.py: not found"),
    (["--task", "scenes:needs_argument"], 1, r"needs arguments \(size\)"),
    (["--task", "scenes:empty"], 1, "task split 'train': is empty"),
    (["--task", "scenes:noisy"], 1, "task loss on split 'train': .* at the same weights"),
    (["--task", "scenes:reduced"], 1, "task loss.*reduc"),
    (["--plan", "none.json"], 1, "none.json: no such file"),
]


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS)
def test_one_line_says_what_is_wrong(
    arguments: list[str], code: int, message: str, command: Lcray, plain_run: Path, tmp_path: Path
) -> None:
    task = () if "--task" in arguments else ("--task", "scenes:plain")
    found = command("analyze", plain_run, "--out", tmp_path / "out", *task, *arguments)
    assert re.search(message, found.error) or message in found.error
    assert found.error.startswith("lcray: ")
    assert found.code == code
    assert not (tmp_path / "out" / "analysis.json").exists()


@pytest.mark.parametrize("verb", ["inspect", "plan", "analyze"])
class TestRunsThatAreNone:
    @pytest.fixture
    def refused(self, verb: str, command: Lcray, tmp_path: Path) -> Callable[[Path], str]:
        more: list[object] = [] if verb == "inspect" else ["--task", "scenes:plain"]
        more += ["--out", tmp_path / "out"] if verb == "analyze" else []

        def refused(run: Path) -> str:
            found = command(verb, run, *more)
            assert found.code == 1
            assert not (tmp_path / "out").exists()
            return found.error

        return refused

    def test_missing(self, refused: Callable[[Path], str], tmp_path: Path) -> None:
        assert f"{tmp_path}/none" in refused(tmp_path / "none")

    def test_empty(self, refused: Callable[[Path], str], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert f"{tmp_path}/empty" in refused(tmp_path / "empty")

    def test_pickled(self, refused: Callable[[Path], str], tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        for step in range(2):
            torch.save({"step": step}, tmp_path / "old" / f"step_{step}.pt")
        assert re.search("pickle.*convert them: lcray convert ", refused(tmp_path / "old"))

    def test_single(
        self, verb: str, refused: Callable[[Path], str], run: Path, command: Lcray
    ) -> None:
        for step in range(1, 13):
            scenes.checkpoint(run, step).unlink()
        if verb == "inspect":
            assert command("inspect", run).code == 0
        else:
            assert re.search("1 checkpoint|one checkpoint|two", refused(run))


@pytest.mark.usefixtures("inline")
class TestAnalyze:
    def analyze(self, command: Lcray, run: Path, out: Path, *more: object) -> Ran:
        return command(
            "analyze", run, "--task", "scenes:plain", "--out", out, "--span-length", 3, *more
        )

    def test_the_summary(self, command: Lcray, run: Path, plain_out: Path, tmp_path: Path) -> None:
        found = self.analyze(command, run, tmp_path / "out", "--elements")
        assert found.code == 0
        assert found.err.splitlines() == [
            "lcray: starting workers",
            "lcray: measuring a gradient",
            "lcray: intervals 0/12",
            "lcray: intervals 12/12",
            "lcray: merging tables",
        ]
        assert f"tables: {tmp_path}/out/tables/*.parquet" in found.out
        assert scenes.tables(tmp_path / "out") == scenes.tables(plain_out)
        frame = lcray.open(plain_out).intervals()
        for split, rows in frame.groupby("split", observed=True):
            (line,) = [li.split() for li in found.out.splitlines() if li.startswith(str(split))]
            change = rows["loss_change"].sum()
            gap = (rows["lc"] - rows["loss_change"]).sum()
            moved = rows[["n_helping", "n_hurting", "n_zero"]].to_numpy().sum()
            assert line[1:] == [
                f"{change:+.4f}",
                f"{rows['lc'].sum():+.4f}",
                f"{gap / abs(change):.3%}",
                f"{rows['gap'].abs().sum() / rows['loss_change'].abs().sum():.3%}",
                f"{rows['first_order_lc'].sum():+.4f}",
                f"{rows['n_helping'].sum() / moved:.1%}",
            ]

    def test_json(self, command: Lcray, run: Path, tmp_path: Path) -> None:
        found = self.analyze(command, run, tmp_path / "out", "--json", "--split", "val")
        data = json.loads(found.out)
        assert data["out"] == str(tmp_path / "out")
        (split,) = data["splits"]
        rows = lcray.open(tmp_path / "out").intervals()
        assert split["split"] == "val"
        assert split["lc"] == pytest.approx(rows["lc"].sum(), rel=1e-9)

    @pytest.mark.slow
    def test_a_torn_checkpoint(self, command: Lcray, run: Path, tmp_path: Path) -> None:
        path = scenes.checkpoint(run, 4)
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        found = self.analyze(command, run, tmp_path / "out")
        assert found.code == 1
        assert "3 intervals are missing (steps 3-6)" in found.error
        assert "step-00000004" in found.error
        refused = command("reduce", tmp_path / "out")
        assert (refused.code, "3 of 12 intervals are missing: steps 3-6" in refused.error) == (1, 1)
        merged = command("reduce", tmp_path / "out", "--allow-missing")
        assert merged.code == 0
        assert "missing steps: 3-6" in merged.out
        assert "intervals: 18 rows" in merged.out
        path.write_bytes(whole)
        assert self.analyze(command, run, tmp_path / "out").code == 0
        assert "missing" not in command("reduce", tmp_path / "out").out
        assert len(lcray.open(tmp_path / "out").intervals()) == 24

    def test_what_is_not_finite_is_said(self, command: Lcray, run: Path, tmp_path: Path) -> None:
        path = scenes.checkpoint(run, 12)
        tensors = load_file(path)
        tensors["0.bias"][0] = float("inf")
        save_file(tensors, path)
        found = self.analyze(command, run, tmp_path / "out")
        assert found.code == 0
        assert re.search(r"^2 intervals have no LC: \w+ 2$", found.out, re.MULTILINE)

    def test_low_precision_is_said(self, command: Lcray, tmp_path: Path) -> None:
        run = scenes.record(scenes.plain, tmp_path / "half", steps=2, dtype=torch.float16)
        found = self.analyze(command, run, tmp_path / "out")
        assert found.code == 0
        (note,) = lcray.open(tmp_path / "out").notes
        assert note in found.out.replace("\n", " ")

    def test_intervals_that_miss_the_tolerance_are_said(
        self, command: Lcray, run: Path, tmp_path: Path
    ) -> None:
        found = self.analyze(command, run, tmp_path / "a", "--rule", "left", "--rtol", "1e-4")
        missed = (lcray.open(tmp_path / "a").intervals()["converged"] == False).sum()  # noqa: E712
        assert missed > 12
        assert f"{missed} of 24 intervals exceed the tolerance (rtol 0.0001); --refine" in found.out
        found = self.analyze(
            command,
            run,
            tmp_path / "b",
            "--refine",
            "--dtype",
            "float64",
            "--rtol",
            "1e-12",
            "--max-panels",
            2,
        )
        assert "--max-panels 4" in found.out

    def test_another_analysis(self, command: Lcray, run: Path, tmp_path: Path) -> None:
        assert self.analyze(command, run, tmp_path / "out", "--rule", "left").code == 0
        found = self.analyze(command, run, tmp_path / "out")
        assert found.code == 1
        assert "(rule: 'left' there, 'simpson' now); choose another --out" in found.error

    def test_a_saved_plan(self, command: Lcray, run: Path, tmp_path: Path) -> None:
        saved = tmp_path / "plan.json"
        options = ["--task", "scenes:plain", "--rule", "trapezoid", "--span-length", 5]
        assert command("plan", run, *options, "--save", saved).code == 0
        again = command("analyze", run, "--task", "scenes:plain", "--out", "a", "--plan", saved)
        assert again.code == 0
        results = lcray.open("a")
        assert results.plan.settings.rule == "trapezoid"
        assert [len(span.intervals) for span in results.plan.spans] == [5, 5, 2]
        refused = command("analyze", run, *options, "--out", tmp_path / "b", "--plan", saved)
        assert (refused.code, "leave the other options out" in refused.error) == (2, True)

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("inline")
class TestPlan:
    def test_what_is_printed(self, command: Lcray, run: Path) -> None:
        options = ["--task", "scenes:plain", "--span-length", 3, "--elements", "--units"]
        found = command("plan", run, *options)
        assert found.code == 0
        assert re.search(r"intervals +12 in 4 spans of up to 3 *\n", found.out)
        assert re.search(r"gradients +56 full-batch gradients *\n", found.out)
        assert re.search(r"splits +train \(17 samples\), val \(6 samples\) *\n", found.out)
        assert re.search(r"elements +1,032 *\n", found.out)  # 2 splits, 12 intervals, 43 elements
        assert re.search(r"units +384 *\n", found.out)  # 2 * 12 * (5 + 5 + 3 + 3)

    def test_json(self, command: Lcray, run: Path) -> None:
        data = json.loads(command("plan", run, "--task", "scenes:plain", "--json").out)
        assert data["estimate"]["n_intervals"] == 12
        assert data["plan"]["settings"]["rule"] == "simpson"
        assert data["workers"] == scenes.InlinePool.size


def talkative() -> torch.nn.Module:
    print("a model is built")
    return scenes.build_plain()


chatty = Task(talkative, scenes.points, scenes.cross_entropy)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("verb", ["plan", "analyze"])
def test_what_others_print_stays_out_of_the_json(
    verb: str, command: Lcray, run: Path, tmp_path: Path
) -> None:
    more = ["--out", tmp_path / "out"] if verb == "analyze" else []
    found = command(verb, run, "--task", "test_app:chatty", "--json", *more)
    assert isinstance(json.loads(found.out), dict)
    assert "a model is built" in found.err


class TestInspect:
    def test_a_run(self, command: Lcray, plain_run: Path) -> None:
        found = command("inspect", plain_run)
        assert found.code == 0
        assert "13 checkpoints, steps 0 to 12; 4 tensors (4 float32), 43 float" in " ".join(
            found.out.split()
        )

    def test_a_torn_file(self, command: Lcray, run: Path) -> None:
        scenes.checkpoint(run, 3).write_bytes(b"torn")
        found = command("inspect", run)
        assert found.code == 1
        assert re.search(r"error .*step-00000003\.safetensors", found.out)
        data = json.loads(command("inspect", run, "--json").out)
        assert data["ok"] is False
        assert [f["severity"] for f in data["findings"]].count("error") == 1


class TestVerify:
    def test_sound(self, command: Lcray, plain_out: Path) -> None:
        found = command("verify", plain_out)
        assert found.code == 0
        assert re.fullmatch(
            re.escape(str(plain_out)) + r": \d+ checks, no problems .*\n", found.out
        )
        sums = "parameters add up to layers of kind parameter over the run"
        assert f"; {sums}; the LC of buffers is in layers)" in found.out
        data = json.loads(command("verify", plain_out, "--json").out)
        assert (data["ok"], data["problems"]) == (True, [])

    def test_damaged(self, command: Lcray, plain_out: Path, tmp_path: Path) -> None:
        out = shutil.copytree(plain_out, tmp_path / "out")
        path = out / "tables" / "layers.parquet"
        text = bytearray(path.read_bytes())
        text[len(text) // 2] ^= 1
        path.write_bytes(text)
        found = command("verify", out)
        assert found.code == 1
        assert "layers.parquet" in found.out
        assert json.loads(command("verify", out, "--json").out)["ok"] is False

    def test_no_output(self, command: Lcray, tmp_path: Path) -> None:
        found = command("verify", tmp_path)
        assert (found.code, found.err) == (1, "")
        assert (
            found.out
            == f"{tmp_path}/analysis.json: no such file; is this the output of an analysis?\n"
        )


class TestStatus:
    def test_a_finished_analysis(self, command: Lcray, plain_out: Path) -> None:
        found = command("status", plain_out, "--watch")  # there is nothing to wait for
        assert (found.code, found.err) == (0, "")
        first, *more = found.out.splitlines()
        assert first == "finished: 12/12 intervals, 4/4 spans, 0 workers"
        rows = lcray.open(plain_out).intervals()
        train = rows[rows["split"] == "train"]
        (line,) = [line for line in more if line.startswith("train")]
        change, lc = f"{train['loss_change'].sum():+.4f}", f"{train['lc'].sum():+.4f}"
        assert line.startswith(f"train: change {change}, LC {lc}, gap ")
        data = json.loads(command("status", plain_out, "--json").out)
        assert (data["state"], data["intervals_done"], data["failed"]) == ("finished", 12, [])

    @pytest.mark.parametrize("end", ["finished", "failed", "interrupted"])
    def test_watching_ends_with_the_analysis(
        self, command: Lcray, end: str, plain_out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = lcray.status(plain_out)
        states = iter(["running", "following", "reducing", end])
        monkeypatch.setattr(lcray, "status", lambda out: replace(whole, state=next(states)))
        monkeypatch.setattr("lcray.cli.status._SECONDS_A_LOOK", 0.0)
        found = command("status", plain_out, "--watch")
        assert re.findall(r"^(\w+): 12/12", found.out, re.M) == [
            "running", "following", "reducing", end,
        ]  # fmt: skip
        assert next(states, None) is None

    def test_without_watching_it_is_shown_once(
        self, command: Lcray, plain_out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running = replace(lcray.status(plain_out), state="running")
        states = iter([running])
        monkeypatch.setattr(lcray, "status", lambda out: next(states))
        assert command("status", plain_out).out.startswith("running: 12/12")

    def test_what_runs_and_what_failed(
        self, command: Lcray, plain_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = RunningSpan(3, 6, 2, 1.0, 3, 7.0)
        failed = FailedSpan(6, 9, "its worker died")
        said = Status(
            "running", 4, 2, 12, 6, 2, (held,), (failed,), 0.5, 10.0, written="2026-01-01T00:00:00"
        )
        monkeypatch.setattr(lcray, "status", lambda out: said)
        lines = command("status", tmp_path).out.splitlines()
        assert lines == [
            "running: 6/12 intervals, 2/4 spans, 2 workers",
            "0.5 intervals/s, 10 s left",
            "running: 3-6, 1/3 intervals in 7 s, try 2",
            "failed: 6-9: its worker died",
            "as of 2026-01-01T00:00:00",
        ]

    def test_no_output(self, command: Lcray, tmp_path: Path) -> None:
        found = command("status", tmp_path)
        assert (found.code, "is this the output of an analysis?" in found.error) == (1, True)

    def test_the_folder_above_an_output(self, command: Lcray, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "analysis.json").write_text("{}")
        found = command("status", tmp_path)
        assert found.code == 1
        assert f"is this the output of an analysis? {tmp_path}/mine is one" in found.error


class TestQuery:
    SQL = "SELECT layer, count(*) AS n, sum(lc) AS lc FROM layers GROUP BY layer ORDER BY n, layer"

    def test_formats_agree_with_the_table(self, command: Lcray, plain_out: Path) -> None:
        frame = lcray.open(plain_out).layers()
        sums = frame.groupby("layer", observed=True)["lc"].sum()
        data = json.loads(command("query", plain_out, self.SQL, "--format", "json").out)
        assert [row["layer"] for row in data] == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert [row["n"] for row in data] == [24] * 4
        assert [row["lc"] for row in data] == pytest.approx(
            [sums[row["layer"]] for row in data], rel=1e-13
        )
        lines = command("query", plain_out, self.SQL, "--format", "csv").out.splitlines()
        assert lines[0] == "layer,n,lc"
        assert float(lines[1].split(",")[2]) == pytest.approx(sums["0.bias"], rel=1e-12)
        table = command("query", plain_out, self.SQL).out.splitlines()
        assert table[0].split() == ["layer", "n", "lc"]
        assert table[1].split() == ["0.bias", "24", f"{sums['0.bias']:.6g}"]

    @pytest.mark.parametrize(
        "sql",
        [
            "COPY layers TO 'stolen.csv'",
            "DROP VIEW layers",
            "CREATE TABLE t AS SELECT 1",
            "SELECT * FROM read_csv('/etc/passwd')",
            "SELECT 1; SELECT 2",
            "SELEKT 1",
            "SELECT nothing FROM layers",
        ],
    )
    def test_what_is_not_one_select_of_the_tables_is_refused(
        self,
        sql: str,
        command: Lcray,
        plain_out: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        found = command("query", plain_out, sql)
        assert found.code == 2
        assert found.error.startswith("lcray: SQL: ")
        assert list(tmp_path.iterdir()) == []

    def test_many_columns_are_not_folded_in_a_pipe(self, command: Lcray, plain_out: Path) -> None:
        found = command("query", plain_out, "SELECT * FROM layers LIMIT 1")
        header, row = found.out.splitlines()
        assert header.split() == list(lcray.open(plain_out).layers().columns)
        assert row.split()[:2] == ["train", "0"]

    def test_json_keeps_every_digit_and_knows_no_nan(self, command: Lcray, plain_out: Path) -> None:
        sql = "SELECT 1.2345678901234567e-20::DOUBLE AS a, 'nan'::DOUBLE AS b, NULL AS c, 3 AS d"
        found = command("query", plain_out, sql, "--format", "json")
        assert json.loads(found.out, parse_constant=pytest.fail) == [
            {"a": 1.2345678901234567e-20, "b": None, "c": None, "d": 3}
        ]

    def test_brackets_are_text(self, command: Lcray, plain_out: Path) -> None:
        found = command("query", plain_out, "SELECT '[red]x[/red]' AS \"[bold]a\"")
        assert found.out.split() == ["[bold]a", "[red]x[/red]"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_demo(command: Lcray, tmp_path: Path) -> None:
    folder = tmp_path / "[demo] of mine"
    found = command("demo", "--dir", folder, "--workers", 2)
    assert found.code == 0, found.err
    assert lcray.verify(folder / "out").ok
    results = lcray.open(folder / "out")
    intervals, layers = results.intervals(), results.layers()
    assert len(intervals) == 2 * 100
    # Per layer, on the training split.
    rows = layers[layers["split"] == "train"].groupby("layer", observed=True)
    sizes = {
        "conv1.weight": 144, "conv1.bias": 16, "conv2.weight": 4608, "conv2.bias": 32,
        "fc1.weight": 8192, "fc1.bias": 64, "fc2.weight": 640, "fc2.bias": 10,
    }  # fmt: skip
    printed = {line.split()[0]: line.split()[1:] for line in found.out.splitlines() if line.strip()}
    assert [name for name in printed if name in sizes] == list(sizes)
    for layer, part in rows:
        moved = part["n_helping"] + part["n_hurting"] + part["n_zero"]
        assert (moved == sizes[layer]).all()
        assert printed[layer] == [
            f"{sizes[layer]:,}",
            f"{part['lc'].sum():+.4f}",
            f"{part['lc_helping'].sum():+.4f}",
            f"{part['lc_hurting'].sum():+.4f}",
            f"{part['n_helping'].sum() / moved.sum():.1%}",
        ]
    # Closure, per split: what the losses say, what Simpson and what the left endpoint alone give.
    for split in ("train", "test"):
        part = intervals[intervals["split"] == split]
        change = part["loss_end"].iloc[-1] - part["loss_start"].iloc[0]
        assert change < -1
        assert abs(part["lc"].sum() - change) < 0.003 * -change
        assert printed[split][:2] == [f"{change:+.4f}", f"{part['lc'].sum():+.4f}"]
        assert printed[split][4] == f"{part['first_order_lc'].sum():+.4f}"
        assert part["first_order_lc"].sum() < part["lc"].sum()  # it overestimates the decrease
    assert str(folder / "run") in found.out
    query = (
        "SELECT layer, sum(lc) AS lc FROM layers WHERE split = 'train' GROUP BY layer ORDER BY lc"
    )
    assert f'lcray query {folder}/out "{query}"' in found.out
    # What it says to try works, and trying the demo again trains and computes nothing.
    table = command("query", folder / "out", query).out.splitlines()
    assert len(table) == 1 + len(sizes)
    kept = scenes.commits(folder / "out")
    again = command("demo", "--dir", folder, "--workers", 1)
    assert again.out == found.out
    assert scenes.commits(folder / "out") == kept


def test_the_demo_in_a_folder_of_something_else(command: Lcray, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    found = command("demo", "--dir", tmp_path)
    assert found.code == 1
    assert found.err == f"lcray: {tmp_path}: not empty; choose another --dir\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


class TestPrograms:
    """As users run it: a process of its own, with a local Ray of its own."""

    @pytest.fixture
    def mark(self) -> Iterator[str]:
        """Is in the environment of every process that a test starts; ends those that are left."""
        mark = f"LCRAY_TEST_{uuid.uuid4().hex}"
        yield mark
        for process in marked(mark):
            process.kill()

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        """A folder with a task in a module, which imports another, and a run."""
        folder = tmp_path / "project"
        folder.mkdir()
        (folder / "net_of_mine.py").write_text(NET)
        (folder / "task_of_mine.py").write_text(TASK)
        scenes.record(scenes.plain, folder / "run", steps=8)
        return folder

    def start(
        self, mark: str, project: Path, *arguments: object, **options: Any
    ) -> subprocess.Popen[str]:
        environment = scenes.python_environment() | {mark: "1"} | options.pop("env", {})
        return subprocess.Popen(
            [*options.pop("program", PROGRAM), *map(str, arguments)],
            cwd=options.pop("cwd", project),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell's background jobs ignore SIGINT, and so would this one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            **options,
        )

    def finish(self, process: subprocess.Popen[str]) -> Ran:
        out, err = process.communicate(timeout=100)
        return Ran(process.returncode, out, err)

    @pytest.mark.slow
    @pytest.mark.ray
    @pytest.mark.usefixtures("ray_cluster")
    def test_a_module_in_the_folder_and_nobody_elses_ray(
        self, project: Path, mark: str, tmp_path: Path
    ) -> None:
        before = set(known_actors())
        found = self.finish(
            self.start(
                mark, project, "analyze", "run", "--task", "task_of_mine:task", "--out", "out",
                "--span-length", 2, "--workers", 1, "--json",
            )
        )  # fmt: skip
        assert found.code == 0, found.err
        assert json.loads(found.out)["out"] == "out"
        assert all(PROGRESS.fullmatch(line) for line in found.err.splitlines()), found.err
        assert "lcray: intervals 8/8" in found.err.splitlines()
        assert set(known_actors()) == before
        assert gone(mark)
        assert lcray.verify(project / "out").ok

    @pytest.mark.ray
    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_leaves_no_process_and_an_output_to_resume(
        self, number: signal.Signals, code: int, project: Path, mark: str
    ) -> None:
        out = project / "out"
        arguments = ["analyze", project / "run", "--task", f"{project}/task_of_mine.py:task"]
        (project / "slow").touch()
        process = self.start(
            mark, project, *arguments, "--out", out, "--span-length", 2, "--workers", 1
        )
        wait_for(lambda: scenes.spans_of(out) or process.poll() is not None, 90)
        names = {each.name() for each in marked(mark)}
        assert any("raylet" in name for name in names)
        process.send_signal(number)
        found = self.finish(process)
        assert (found.code, found.out) == (code, ""), found.err
        assert "Traceback" not in found.err
        last = "lcray: interrupted; run the same command again to resume"
        assert found.err.splitlines()[-2:] == ["", last]  # the first ends the line of the ^C
        assert gone(mark)
        (project / "slow").unlink()
        kept = scenes.commits(out)
        assert 1 <= len(scenes.spans_of(out)) < 4
        options = {"span_length": 2, "resources": lcray.Resources(workers=1)}
        with pytest.MonkeyPatch.context() as patch:
            scenes.work_inline(patch)
            for folder in (out, project / "undisturbed"):
                lcray.analyze(project / "run", arguments[-1], folder, **options)
        assert kept.items() <= scenes.commits(out).items()
        assert scenes.tables(out) == scenes.tables(project / "undisturbed")

    @pytest.mark.ray
    @pytest.mark.slow
    @pytest.mark.usefixtures("ray_cluster")
    @pytest.mark.parametrize("way", ["option", "environment"])
    def test_an_address_is_honoured(self, way: str, project: Path, mark: str) -> None:
        before = set(known_actors())
        address = ray.get_runtime_context().gcs_address
        option = ["--address", address] if way == "option" else []
        process = self.start(
            mark, project, "plan", "run", "--task", "task_of_mine:task", "--workers", 1, *option,
            env={"RAY_ADDRESS": address} if way == "environment" else {},
        )  # fmt: skip
        found = self.finish(process)
        assert found.code == 0, found.err
        assert len(set(known_actors()) - before) == 1

    @pytest.mark.ray
    @pytest.mark.slow
    def test_an_address_without_a_cluster(self, project: Path, mark: str) -> None:
        found = self.finish(
            self.start(
                mark, project, "plan", "run", "--task", "task_of_mine:task",
                "--address", "127.0.0.1:1",
            )
        )  # fmt: skip
        assert found.code == 1
        assert found.error.startswith("lcray: Ray at '127.0.0.1:1': cannot be reached")

    @pytest.mark.ray
    @pytest.mark.slow
    def test_an_object_of_the_script_that_runs(self, project: Path, mark: str) -> None:
        (project / "script.py").write_text(TASK + SCRIPT)
        process = self.start(mark, project, program=[sys.executable, "script.py"])
        found = self.finish(process)
        assert found.code == 0, found.err
        assert found.out.splitlines()[-1] == "8 intervals"
        assert gone(mark)

    @pytest.mark.ray
    @pytest.mark.slow
    def test_a_worker_that_dies_leaves_stdout_alone(self, project: Path, mark: str) -> None:
        (project / "die").touch()
        found = self.finish(
            self.start(
                mark, project, "analyze", "run", "--task", "task_of_mine:task", "--out", "out",
                "--workers", 1, "--json",
            )
        )  # fmt: skip
        assert found.code == 0, found.err
        assert not (project / "die").exists()
        assert json.loads(found.out)["out"] == "out"


NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
"""

TASK = """
import os, time
import torch, torch.nn.functional as F
from lcray import Task
from net_of_mine import build

HERE = os.path.dirname(os.path.abspath(__file__))

def splits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 4, generator=generator)
    return {"train": (x, x[:, :3].argmax(1))}

evaluations = []

def loss(model, batch):
    evaluations.append(1)
    if os.path.exists(HERE + "/slow"):
        time.sleep(0.4)
    if len(evaluations) > 4 and os.path.exists(HERE + "/die"):
        os.remove(HERE + "/die")
        os.kill(os.getpid(), 9)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

task = Task(build, splits, loss)
"""

SCRIPT = """
if __name__ == "__main__":
    import lcray
    results = lcray.analyze("run", task, "out", resources=lcray.Resources(workers=1))
    assert lcray.verify("out").ok
    print(len(results.intervals()), "intervals")
"""


def marked(mark: str) -> list[psutil.Process]:
    """The processes with `mark` in their environment, those that have ended left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(mark: str) -> bool:
    """Whether such processes end within 20 seconds."""
    wait_for(lambda: not marked(mark), 20)
    return not marked(mark)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def known_actors() -> list[str]:
    """The actors that the shared Ray has ever had."""
    from ray._private.state import actors

    return list(actors())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestTasksOnWorkers:
    """Found on a worker without more: the task itself decides, so planning is enough."""

    def test_a_file_with_its_neighbours(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "beside").mkdir()
        (tmp_path / "beside" / "net_of_mine.py").write_text(NET)
        (tmp_path / "beside" / "file_of_mine.py").write_text(TASK)
        reference = os.path.relpath(tmp_path / "beside" / "file_of_mine.py") + ":task"
        report = lcray.plan(run, reference, resources=lcray.Resources(workers=1))
        assert [split.n_items for split in report.plan.splits] == [23]

    def test_an_object_of_a_module_that_only_the_driver_finds(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "net_of_mine.py").write_text(NET)
        (tmp_path / "lib" / "library_of_mine.py").write_text(TASK)
        monkeypatch.syspath_prepend(tmp_path / "lib")
        import library_of_mine

        report = lcray.plan(run, library_of_mine.task, resources=lcray.Resources(workers=1))
        assert [split.n_items for split in report.plan.splits] == [23]


@pytest.fixture(autouse=True)
def no_modules_left() -> Iterator[None]:
    """What tests import from folders of their own is forgotten."""
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.endswith("_of_mine") or name.startswith("_lcray_task_"):
            del sys.modules[name]
    sys.path[:] = path


def test_the_first_steps_stand_apart(command: Lcray) -> None:
    shown = command("--help").out
    assert "\\b" not in shown and "\b" not in shown
    lines = [line.split() for line in shown.splitlines()]
    start = next(n for n, words in enumerate(lines) if words[:2] == ["First", "steps:"])
    verbs = [words[1] for words in lines[start + 1 :][:8] if words[:1] == ["lcray"]]
    assert verbs == ["demo", "inspect", "plan", "analyze", "report", "query"]
    assert lines[start] == ["First", "steps:"]
