"""Outputs in which little or nothing has LC: every verb answers, with nothing or with one line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import planting
import pytest
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

import lcray
from lcray import plots
from lcray.analyses.memorising import overfitting
from lcray.analyses.registry import FINDINGS
from lcray.analyses.tidy import notes_of
from lcray.cli.display.findings import findings_summary
from lcray.cli.display.results import layer_table, summary
from lcray.cli.status import status_text
from lcray.errors import InapplicableError, LcrayError
from lcray.tables.reading.results import Results

STARTS = (0, 2, 4, 6, 8, 10)


def bad(*starts: int, split: str, status: str = "nonfinite_loss") -> dict[tuple[str, int], str]:
    return {(split, start): status for start in starts}


#: The splits of the factory are val, train, in this order.
WORLDS: dict[str, dict[str, Any]] = {
    "nothing in the first split": {"bad": bad(*STARTS, split="val")},
    "nothing in the second split": {"bad": bad(*STARTS, split="train")},
    "nothing at all": {"bad": bad(*STARTS, split="val") | bad(*STARTS, split="train")},
    "one interval": {"spans": ((0, 2),)},
    "one interval without LC": {
        "spans": ((0, 2),),
        "bad": bad(0, split="val") | bad(0, split="train", status="nonfinite_gradient"),
    },
    "the first interval alone": {"bad": bad(*STARTS[1:], split="val") | bad(2, split="train")},
    "never both": {"bad": bad(0, 4, 8, split="val") | bad(2, 6, 10, split="train")},
}


@pytest.fixture(scope="module", params=WORLDS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("diverged") / "out"
    planting.write_reduced(out, planting.make_world(**WORLDS[request.param]))
    return lcray.open(out)


@pytest.mark.parametrize(
    "windows",
    [
        {"window": 3},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"windows": {"early": "0:2"}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_finding_answers(results: Results, windows: dict[str, Any]) -> None:
    found = lcray.findings(results.path, **windows)
    assert {*found} | {*found.impossible} == {finding.name for finding in FINDINGS}
    for name, reason in found.impossible.items():
        assert len(reason) > 30 and "\n" not in reason, name


@pytest.mark.slow
def test_what_is_shown_and_exported(results: Results, tmp_path: Path) -> None:
    found = lcray.findings(results.path)
    console = Console(width=200, record=True, file=io.StringIO())
    for shown in (
        findings_summary(found, 80),
        summary(results),
        layer_table(results),
        status_text(lcray.status(results.path)),
    ):
        console.print(shown)
    assert "nan" not in console.export_text().lower().replace("dominant", "")
    lcray.report(results.path, file=tmp_path / "report.html")
    for kind in ("csv", "tensorboard"):
        assert lcray.export(results.path, kind, tmp_path / kind)
    for name in results.contents()["name"]:
        results.sql(f"SELECT * FROM {name}")
    assert len(results.confidence()) > 0
    assert lcray.verify(results.path).problems == ()


@pytest.mark.parametrize(
    "name", ["loss", "layer_totals", "memorising", "fisher", "shares", "layer_map", "trajectories"]
)
def test_plots_draw_or_say_why_not(results: Results, name: str) -> None:
    from matplotlib import pyplot

    try:
        getattr(plots, name)(results)
    except LcrayError as error:
        assert isinstance(error, InapplicableError) and "LC" in str(error)
    finally:
        pyplot.close("all")


def test_overfitting_says_that_nothing_could_be_judged(tmp_path: Path) -> None:
    world = planting.make_world(**WORLDS["nothing in the first split"])
    planting.write_reduced(tmp_path / "out", world)
    found = overfitting(lcray.open(tmp_path / "out"))
    assert set(found["n_windows"].to_pylist()) == {0}
    assert set(found["onset"].to_pylist()) == {None}
    assert [*notes_of(found)] == ["no interval has LC on two splits: nothing was judged"]


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@pytest.mark.slow
def test_a_run_that_diverged(plain_run: Path, tmp_path: Path, inline: None, factor: float) -> None:
    run = shutil.copytree(plain_run, tmp_path / "run")
    for path in sorted(run.glob("step-*.safetensors"))[1:]:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) * factor for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        save_file(tensors, path, metadata)
    results = lcray.analyze(
        run, "scenes:plain", tmp_path / "out", fisher=4, fisher_kind="empirical"
    )
    assert set(results.intervals()["status"]) - {"ok"}
    found = lcray.findings(tmp_path / "out")
    assert len(found) + len(found.impossible) == len(FINDINGS)
    lcray.report(tmp_path / "out")
    for kind in ("csv", "tensorboard"):
        assert lcray.export(tmp_path / "out", kind, tmp_path / kind)
