"""A second pass over a run traces what the first one found, with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scenes
from click.testing import CliRunner

import lcray
from lcray.cli.app import app
from lcray.errors import OutputError, UsageError

pytestmark = pytest.mark.usefixtures("inline")


def test_the_parameters_that_help_and_hurt_most(plain_run: Path, out: Path) -> None:
    before = scenes.tables(out)
    found = lcray.trace(plain_run, "scenes:plain", out, elements=["top:2"])
    assert found.path == out / "traced"
    assert scenes.tables(out) == before
    first = lcray.open(out)
    everything = first.parameters().set_index(["layer", "index"])
    chosen = set()
    for split in first.plan.splits:
        lc = everything[everything["split"] == split.name]["lc"].sort_values()
        chosen |= {*lc[lc < 0].index[:2], *lc[lc > 0].index[-2:]}
    traces = found.traces()
    assert {(str(a), b) for a, b in traces.set_index(["layer", "index"]).index} == chosen
    # LC of every interval is that of the first pass to the last bit that `elements` keeps.
    lc = traces.dropna(subset="lc").rename(columns={"step": "start_step"})
    keys = ["split", "layer", "index", "start_step"]
    both = lc.merge(first.elements(), on=keys, suffixes=("", "_before"))
    assert len(both) == len(lc) == len(chosen) * len(first.plan.splits) * 12
    assert np.array_equal(both["lc"].astype(np.float32), both["lc_before"])
    assert found.intervals()["lc"].equals(first.intervals()["lc"])
    assert lcray.verify(out / "traced").problems == ()
    assert lcray.verify(out).problems == ()


def test_again_it_resumes_and_other_elements_go_elsewhere(
    plain_run: Path, out: Path, tmp_path: Path
) -> None:
    name = next(la.name for la in lcray.open(out).plan.layers if la.kind == "parameter")
    lcray.trace(plain_run, "scenes:plain", out, elements=[f"{name}:0"])
    tables, commits = scenes.tables(out / "traced"), scenes.commits(out / "traced")
    lcray.trace(plain_run, "scenes:plain", out, elements=[f"{name}:0"])
    assert (scenes.tables(out / "traced"), scenes.commits(out / "traced")) == (tables, commits)
    with pytest.raises(OutputError, match="other elements or steps; choose another --into"):
        lcray.trace(plain_run, "scenes:plain", out, elements=[f"{name}:1"])
    arguments = ["trace", str(plain_run), "--task", "scenes:plain", "--out", str(out)]
    more = ["--trace", f"{name}:1", "--into", str(tmp_path / "more")]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    assert set(lcray.open(tmp_path / "more").traces()["index"]) == {1}


def test_what_cannot_be_traced(plain_run: Path, out: Path, tmp_path: Path) -> None:
    for element, words in (
        ("nothing:0", "unknown layer 'nothing'"),
        ("top:0", "top 0: must be at least 1"),
        ("top", "must have the form layer:index"),
        ("top:٣", "must have the form layer:index"),
    ):
        with pytest.raises(UsageError, match=words):
            lcray.trace(plain_run, "scenes:plain", out, elements=[element])
    assert not (out / "traced").exists()
    task = scenes.plain
    data = task.splits() if callable(task.splits) else task.splits
    moved = {name: (x + 1, *rest) for name, (x, *rest) in data.items()}
    other = replace(task, splits=moved)
    with pytest.raises(OutputError, match="holds another analysis"):
        lcray.trace(plain_run, other, out, into=tmp_path / "other")
    with pytest.raises(
        UsageError, match="trace 'top:3': available only after the analysis; then run lcray trace"
    ):
        lcray.analyze(plain_run, "scenes:plain", tmp_path / "new", trace=("top:3",))


@pytest.mark.parametrize("top", [str(2**63), "9" * 5000])
def test_more_than_there_are_is_all_of_them(plain_run: Path, out: Path, top: str) -> None:
    found = lcray.trace(plain_run, "scenes:plain", out, elements=[f"top:{top}"])
    moved = lcray.open(out).parameters()
    moved = moved[moved["lc"] != 0]
    chosen = {(str(a), b) for a, b in zip(moved["layer"], moved["index"], strict=True)}
    traced = found.traces()
    assert {(str(a), b) for a, b in zip(traced["layer"], traced["index"], strict=True)} == chosen
