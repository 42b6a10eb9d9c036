"""`--rule simpson-sampled` from a run to its tables: the same whatever the spans and workers."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from rich.console import Console
from safetensors.torch import load_file

import lcray
from lcray.allocation.quadrature import get_rule
from lcray.analyses.closure import closures
from lcray.cli.display.results import closure_table
from lcray.errors import TaskError, UsageError
from lcray.execution.worker.workspace import Workspace
from lcray.planning.check import check_plan, read_plan
from lcray.planning.make import make_plan, make_settings
from lcray.storage.files import read_json

OPTIONS: dict[str, Any] = {"rule": "simpson-sampled", "sampling_error": 0.2, "batch_size": 4}


def many() -> dict[str, scenes.Pair]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    return {"train": (x[:200], y[:200]), "val": (x[200:], y[200:])}


TASK = replace(scenes.plain, splits=many)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.record(TASK, tmp_path_factory.mktemp("sampled") / "run", steps=40)


@pytest.fixture(scope="module")
def results(run: Path) -> lcray.Results:
    return scenes.by_one_worker(TASK, run, run.parent / "16", 16, **OPTIONS)


def test_other_spans_give_the_same_rows(run: Path, results: lcray.Results, tmp_path: Path) -> None:
    other = scenes.by_one_worker(TASK, run, tmp_path / "48", 48, **OPTIONS)
    assert len(results.plan.spans) == 3 and len(other.plan.spans) == 1
    for table in ("intervals", "layers", "units", "groups"):
        assert results.arrow(table).equals(other.arrow(table)), table


def test_the_tables_are_sound_and_say_how_far_they_may_be_off(results: lcray.Results) -> None:
    assert lcray.verify(results.path).problems == ()
    rows = results.intervals()
    train, val = (rows[rows["split"] == name] for name in ("train", "val"))
    assert set(rows["rule"]) == {"simpson-sampled"} and rows["converged"].isna().all()
    assert train["n_gradients"].tolist() == ([2] + [1] * 15) * 2 + [2] + [1] * 7
    assert train["gradient_cost"].mean() < 1.6
    assert (val["gradient_cost"] == 2).all() and (val["lc_se"] == 0).all()  # 10 batches: all
    first = train["lc_se"].to_numpy()[:16]  # later, a few batches make up the spread: null
    assert first[0] == 0 and (first[1:] > 0).all()
    gaps = train["gap"].abs() / train["lc_se"]
    assert np.mean(gaps[train["lc_se"] > 0] < 1.96) > 0.8  # the gap is mostly of the sample


def test_variances_add_up_over_time(results: lcray.Results, tmp_path: Path) -> None:
    layers = results.layers()
    for (split, layer), of in layers.groupby(["split", "layer"], observed=True):
        where = f"split = '{split}' AND layer = '{layer}'"
        (found,) = results.sql(f"SELECT lc_se FROM layer_totals WHERE {where}")["lc_se"]
        if of["lc_se"].isna().any():
            assert math.isnan(found)
        else:
            assert found == pytest.approx(math.sqrt((of["lc_se"] ** 2).sum()), rel=1e-12)
    closure = results.sql("SELECT split, gradient_cost FROM closure").set_index("split")
    costs = results.intervals().groupby("split", observed=True)["gradient_cost"].sum()
    assert closure["gradient_cost"].to_dict() == pytest.approx(costs.to_dict(), rel=1e-12)


def test_the_summary_and_the_report_show_the_error(tmp_path: Path) -> None:
    run = scenes.record(TASK, tmp_path / "run", steps=16)
    short = scenes.by_one_worker(TASK, run, tmp_path / "out", 16, **OPTIONS)
    train, val = closures(short)
    variances = short.intervals().query("split == 'train'")["lc_se"] ** 2
    assert train.lc_half == pytest.approx(1.96 * math.sqrt(variances.sum()), rel=1e-12)
    assert val.lc_half == 0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(closure_table(short))
    text = console.export_text()
    assert f"{train.lc:+.4f} ± {train.lc_half:.4f}" in text and text.count("±") == 2  # the title
    page = lcray.report(short.path)
    assert isinstance(page, Path) and "(95 %) from sampling batches" in page.read_text()


def test_it_is_simpson_to_within_its_error(
    run: Path, results: lcray.Results, tmp_path: Path
) -> None:
    exact = scenes.by_one_worker(TASK, run, tmp_path / "out", 48, rule="simpson", batch_size=4)
    ours, theirs = results.layers(), exact.layers()
    off, se = (ours["lc"] - theirs["lc"]).abs(), ours["lc_se"]
    assert (off[se == 0] == 0).all()  # all batches: bit for bit
    assert 0 < off.sum() / theirs["lc"].abs().sum() < OPTIONS["sampling_error"]
    assert exact.layers()["lc_se"].isna().all() and exact.intervals()["lc_se"].isna().all()
    assert (exact.intervals()["gradient_cost"] == exact.intervals()["n_gradients"]).all()
    loss = exact.intervals()[["loss_start", "loss_end"]]
    assert results.intervals()[["loss_start", "loss_end"]].equals(loss)


def test_a_probe_chooses_batches_small_enough_to_sample(run: Path) -> None:
    work = Workspace(TASK, str(run), make_settings({"rule": "simpson-sampled"}))
    assert work.bench.largest_batch == 16  # of 200 samples; else 48 batches
    assert work.probe().tuning.batch_size <= 16
    plain = Workspace(TASK, str(run), make_settings({}))
    assert plain.bench.largest_batch == 8192
    assert plain.bench.room >= work.bench.room  # two vectors more


def test_batches_that_are_part_of_the_loss_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="batches are part of the loss; use simpson"):
        Workspace(replace(TASK, batch_loss=True), str(run), make_settings(OPTIONS))


def test_a_loss_that_changes_its_weights_is_still_noticed(run: Path, tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> Any:
        losses = scenes.cross_entropy(model, batch)
        weights = torch.ones_like(losses)
        weights[0] += next(model.parameters()).flatten()[0].detach().abs()
        return losses, weights

    with pytest.raises(TaskError):
        scenes.by_one_worker(replace(TASK, loss=loss), run, tmp_path / "out", 48, **OPTIONS)


def test_one_pair_of_states_takes_all_batches(run: Path) -> None:
    states = [load_file(scenes.checkpoint(run, step)) for step in (0, 1)]
    found, exact = (
        lcray.allocate(TASK, *states, rule=rule, batch_size=4)
        for rule in ("simpson-sampled", "simpson")
    )
    for split in found:
        assert found[split].converged is None
        for name, values in found[split].elements.items():
            assert torch.equal(values, exact[split].elements[name])


def test_a_plan_of_the_rule_that_has_gone_can_be_read_but_not_used(results: lcray.Results) -> None:
    data = read_json(results.path / "analysis.json")["plan"]
    data["settings"] |= {"rule": "auto"}
    plan = read_plan(data)
    assert get_rule(plan.settings.rule).nodes == get_rule("simpson").nodes
    with pytest.raises(UsageError, match="'auto': is no longer offered"):
        check_plan(plan)
    with pytest.raises(UsageError, match="'auto': is no longer offered"):
        make_plan(plan.steps, plan.settings, plan.layers, plan.splits)
