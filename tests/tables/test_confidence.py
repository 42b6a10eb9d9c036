"""Estimates from a sample: against enumeration of all samples, closed forms, and the whole data.

The loss of an item is ½(θ·x − y)², a parabola along a straight path, so that LC of an item is
Δ_j x_j (θ̄·x − y) at the middle θ̄ of the path, and every rule of degree 1 is exact.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planting
import pyarrow.parquet as pq
import pytest
import scenes
import torch
from console import shown
from numpy.typing import NDArray
from torch import Tensor, nn

import lcray
from lcray.cli.display.plan import plan_table
from lcray.cli.display.results import summary
from lcray.errors import TaskError, UsageError
from lcray.execution.driver.analyze import PlanReport
from lcray.execution.in_memory import allocate
from lcray.execution.worker.workspace import Workspace
from lcray.planning.check import read_plan
from lcray.planning.make import make_settings
from lcray.planning.plan import SplitPlan
from lcray.tables.reading.confidence import Replication, columns, quantile
from lcray.tables.reducing.reduce import reduce
from lcray.tables.verifying.verify import verify
from lcray.tasks.data.sampling import draw
from lcray.tasks.task import Task

Floats = NDArray[np.float64]


class TestEstimates:
    @pytest.mark.parametrize(("n", "replicates"), [(2, 2), (3, 2), (4, 2), (4, 3)])
    def test_unbiased_over_all_samples_and_all_divisions(self, n: int, replicates: int) -> None:
        """Exactly: the mean over everything that could have been drawn, in every order."""
        population = np.array([1.0, -2.0, 0.5, 7.0, 3.0])
        found, variances = [], []
        for order in itertools.permutations(range(5), n):
            parts = [population[list(order[k::replicates])] for k in range(replicates)]
            weights = tuple(float(len(part)) for part in parts)
            estimate, error = Replication(n, 5, weights).estimates([[p.mean() for p in parts]])
            assert estimate[0] == pytest.approx(population[list(order)].mean(), rel=1e-14)
            found.append(estimate[0])
            variances.append(error[0] ** 2)
        assert np.mean(found) == pytest.approx(population.mean(), rel=1e-12)
        assert np.var(found) == pytest.approx(population.var(ddof=1) / n * (1 - n / 5), rel=1e-12)
        assert np.mean(variances) == pytest.approx(np.var(found), rel=1e-12)

    def test_weights_make_it_a_ratio(self) -> None:
        """Two replicates: estimate Σwx/Σw, and the linearized variance worked out by hand."""
        estimate, error = Replication(6, 12, (1.0, 3.0)).estimates([[2.0, 6.0]])
        # (1·2 + 3·6)/4 = 5; shares times distances: ¼·3 and ¾·1; (1 − ½)·(9/16 + 9/16)/(1 − ½)
        assert estimate.tolist() == [5.0] and error.tolist() == [math.sqrt(9 / 8)]

    def test_a_replicate_without_weight_says_nothing_of_its_own(self) -> None:
        estimate, error = Replication(3, 6, (1.0, 1.0, 0.0)).estimates([[2.0, 6.0, 0.0]])
        # Distances −1, 1, 0 with shares: 0.5·8·… = (1 − ½)(1² + 1²)/(1 − 3/9)
        assert estimate.tolist() == [4.0] and error == pytest.approx([math.sqrt(1.5)])

    def test_one_replicate_with_all_weight_does_not_make_certain(self) -> None:
        """There is nothing to tell from how far it may be off."""
        found = columns(Replication(3, 6, (0.0, 2.0, 0.0)), [6.0], [[0.0, 6.0, 0.0]], 0.95)
        assert found["estimate"].tolist() == [6.0]
        assert np.isnan([found["se"], found["low"], found["high"]]).all()

    @pytest.mark.parametrize(
        ("level", "degrees", "t"),
        # Of one degree t = tan(π·level/2), of two level·√(2/(1 − level²)); the rest from tables.
        [(0.5, 1, 1.0), (0.6, 2, 0.6 * math.sqrt(2 / 0.64)), (0.95, 19, 2.093), (0.99, 19, 2.861)],
    )
    def test_quantiles(self, level: float, degrees: int, t: float) -> None:
        assert quantile(level, degrees) == pytest.approx(t, abs=5e-4)

    @pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
    def test_levels(self, level: float) -> None:
        for sample in (Replication(2, 3, (1.0, 1.0)), None):
            with pytest.raises(UsageError, match=r"must be between 0 and 1, as in 0\.95"):
                columns(sample, [1.0], [[1.0, 1.0]], level)


class Products(nn.Module):
    """θ·x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.theta + self.b


def squares(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch[:2]
    return (model(x) - y) ** 2 / 2


def weighted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return squares(model, batch), batch[2]


N = 400


def population() -> tuple[Tensor, Tensor, Tensor]:
    """Skewed inputs with an error that depends on them; and weights, some of them 0."""
    rng = np.random.default_rng(3)
    x = np.stack([rng.gamma(2.0, size=N), rng.normal(size=N)], axis=1)
    y = x @ np.array([0.7, -0.4]) + 0.3 * x[:, 0] * rng.normal(size=N)
    w = rng.integers(0, 3, size=N)
    return tuple(torch.tensor(part, dtype=torch.float64) for part in (x, y, w))  # type: ignore[return-value]


PATH = np.array([[0.0, 0.0, 0.1], [0.5, -0.1, 0.0], [0.4, -0.5, -0.1], [0.8, -0.3, 0.05]])
NAMES = ("theta", "b")  # layers; theta has two elements


def state(step: int) -> dict[str, Tensor]:
    theta = torch.tensor(PATH[step])
    return {"theta": theta[:2].clone(), "b": theta[2].clone()}


def by_item(step: int) -> Floats:
    """Loss change, LC, LC of theta and of b of each item between two steps, [4, N]."""
    x, y, _ = (part.numpy() for part in population())
    x = np.concatenate([x, np.ones((N, 1))], axis=1)
    before, after = PATH[step], PATH[step + 1]
    change = ((x @ after - y) ** 2 - (x @ before - y) ** 2) / 2
    lc = (after - before) * x * (x @ ((before + after) / 2) - y)[:, None]
    return np.stack([change, lc.sum(1), lc[:, :2].sum(1), lc[:, 2]])


def estimate_of(task: Task, step: int, samples: int, seed: int) -> pd.DataFrame:
    options: dict[str, Any] = {"samples": samples, "sample_seed": seed, "dtype": "float64"}
    found = allocate(task, state(step), state(step + 1), **options)["train"]
    return found.confidence()


def task_of(loss: Any = squares, groups: Any = None) -> Task:
    return Task(Products, {"train": population()}, loss, groups=groups)


def by_rank(batch: Any) -> Tensor:
    return (batch[0][:, 0] > 1).long() + (batch[0][:, 0] > 2)


class TestInMemory:
    @pytest.mark.parametrize("loss", [squares, weighted])
    @pytest.mark.parametrize("groups", [None, by_rank])
    def test_a_sample_is_its_own_closed_form(self, loss: Any, groups: Any) -> None:
        sample = draw("train", N, 90, 7)
        assert sample is not None
        found = estimate_of(task_of(loss, groups), 0, 90, 7)
        assert found["quantity"].tolist() == ["loss_change", "lc", "lc", "lc"]
        assert found["layer"].tolist() == ["", "", *NAMES]
        items = by_item(0)[:, sample.numbers]
        w = population()[2].numpy()[sample.numbers] if loss is weighted else np.ones(90)
        means = items @ w / w.sum()
        assert np.allclose(found["estimate"], means, rtol=1e-12, atol=0)
        # 20 replicates: 10 of five samples, 10 of four.
        z = [
            ((items - means[:, None]) * w)[:, sample.replicates == k].sum(1) / w.sum()
            for k in range(20)
        ]
        scale = (1 - 90 / N) / (1 - (10 * 25 + 10 * 16) / 90**2)
        error = np.sqrt(scale * (np.array(z) ** 2).sum(0))
        assert np.allclose(found["se"], error, rtol=1e-10, atol=0)
        assert np.allclose(found["high"] - found["estimate"], 2.0930240544 * error, rtol=1e-9)
        assert np.allclose(found["estimate"] - found["low"], 2.0930240544 * error, rtol=1e-9)

    def test_groups_are_those_of_the_sample(self) -> None:
        """Whether labels differ between samples, or within them (two items a sample)."""
        sample = draw("train", N, 90, 7)
        assert sample is not None
        numbers = torch.from_numpy(sample.numbers)

        def twice(model: nn.Module, batch: Any) -> Tensor:
            return torch.stack([squares(model, batch), 2 * squares(model, batch)], 1).flatten()

        def mixed(batch: Any) -> Tensor:
            return torch.stack([by_rank(batch), by_rank(batch) + 1], 1).flatten()

        for loss, groups in ((squares, by_rank), (twice, mixed)):
            whole = task_of(loss, groups)
            part = replace(whole, splits={"train": tuple(t[numbers] for t in population())})
            ends, options = (state(0), state(1)), {"dtype": "float64"}
            drawn = allocate(whole, *ends, samples=90, sample_seed=7, **options)["train"]
            plain = allocate(part, *ends, **options)["train"]
            for group, layers in plain.groups.items():
                assert drawn.groups[group] == pytest.approx(layers, rel=1e-11)
            assert drawn.lc == pytest.approx(plain.lc, rel=1e-12)
            assert drawn.replicates is not None and drawn.replication is not None
            estimates, _ = drawn.replication.estimates(drawn.replicates)
            expected = [drawn.loss_change, drawn.lc, *drawn.layers()["lc"]]
            assert estimates == pytest.approx(expected, rel=1e-11)

    def test_all_of_the_data_have_no_error(self) -> None:
        found = estimate_of(task_of(), 0, N, 0)
        assert np.allclose(found["estimate"], by_item(0).mean(1), rtol=1e-12)
        assert (found[["low", "high"]].to_numpy() == found[["estimate"]].to_numpy()).all()
        assert (found["se"] == 0).all()


def hits(values: Floats, seeds: range, n: int) -> tuple[Floats, Floats, Floats]:
    """Estimates, standard errors, and whether the interval holds the truth; [seeds, Q] each."""
    estimates, errors = [], []
    for seed in seeds:
        sample = draw("train", values.shape[1], n, seed)
        assert sample is not None
        parts = [values[:, sample.numbers[sample.replicates == k]] for k in range(20)]
        replication = Replication(n, values.shape[1], tuple(float(p.shape[1]) for p in parts))
        estimate, error = replication.estimates(np.stack([p.mean(1) for p in parts], axis=1))
        estimates.append(estimate)
        errors.append(error)
    found, spread = np.array(estimates), np.array(errors)
    return found, spread, abs(found - values.mean(1)) <= quantile(0.95, 19) * spread


def test_estimates_and_intervals_over_many_seeds() -> None:
    """An interval, and the run, whose intervals all come from the same sample."""
    run = np.sum([by_item(step) for step in range(3)], axis=0)
    values = np.concatenate([by_item(0), run])
    times = 1000
    found, spread, held = hits(values, range(times), 100)
    truth = values.mean(1)
    exact = values.std(1, ddof=1) / math.sqrt(100) * math.sqrt(1 - 100 / N)
    assert (abs(found.mean(0) - truth) < 4 * exact / math.sqrt(times)).all()
    assert np.allclose((spread**2).mean(0), exact**2, rtol=0.08)
    # 0.95 to four standard errors of 1000 throws, and 0.01 for the skew of the items.
    assert (abs(held.mean(0) - 0.95) < 0.01 + 4 * math.sqrt(0.95 * 0.05 / times)).all()


@pytest.mark.slow
def test_estimates_and_intervals_over_many_seeds_end_to_end() -> None:
    truth, times, held, found = by_item(0).mean(1), 200, [], []
    task = task_of()
    for seed in range(times):
        frame = estimate_of(task, 0, 100, seed)
        found.append(frame["estimate"].to_numpy())
        held.append((frame["low"] <= truth) & (truth <= frame["high"]))
    exact = by_item(0).std(1, ddof=1) / math.sqrt(100) * math.sqrt(1 - 100 / N)
    assert (abs(np.mean(found, axis=0) - truth) < 4 * exact / math.sqrt(times)).all()
    assert (np.mean(held, axis=0) > 0.89).all()


@pytest.fixture(scope="module")
def out(plain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of the 17 samples of `train`, all six of `val`; spans of five intervals. Read only."""
    folder = tmp_path_factory.mktemp("sampled") / "out"
    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        lcray.analyze(plain_run, "scenes:plain", folder, **OPTIONS)
    return folder


OPTIONS: dict[str, Any] = {"samples": 10, "sample_seed": 5, "dtype": "float64", "span_length": 5}


class TestTables:
    def test_the_output_is_sound(self, out: Path) -> None:
        found = verify(out)
        assert found.problems == ()
        assert "weighted LC of replicate_layers adds up to that of layers" in found.checks

    def test_replicates_are_analyses_of_their_samples(self, out: Path, plain_run: Path) -> None:
        """Each replicate (one sample here) against `allocate` on that sample alone."""
        sample = draw("train", 17, 10, 5)
        assert sample is not None
        by_number = dict(zip(sample.replicates.tolist(), sample.numbers.tolist(), strict=True))
        tables, x_y = lcray.open(out), scenes.points()["train"]
        whole, by_layer = tables.replicates(), tables.replicate_layers()
        assert len(whole) == 12 * 10 and set(whole["split"]) == {"train"}
        assert (whole["weight"] == 0.1).all() and (by_layer["weight"] == 0.1).all()
        series = lcray.checkpoints.open_series(plain_run)
        for step, replicate in ((0, 3), (7, 9)):
            part = tuple(t[[by_number[replicate]]] for t in x_y)
            task = replace(scenes.plain, splits={"train": part})
            ends = [series.read(step + end).tensors for end in (0, 1)]
            alone = allocate(task, *ends, dtype="float64")["train"]
            (row,) = whole.query(f"start_step == {step} and replicate == {replicate}").to_dict(
                "records"
            )
            assert row["end_step"] == step + 1
            assert row["loss_start"] == pytest.approx(alone.loss_start, rel=1e-12)
            assert row["loss_end"] == pytest.approx(alone.loss_end, rel=1e-12)
            assert row["lc"] == pytest.approx(alone.lc, rel=1e-10)
            rows = by_layer.query(f"start_step == {step} and replicate == {replicate}")
            assert dict(zip(rows["layer"], rows["lc"], strict=True)) == pytest.approx(
                alone.layers()["lc"].to_dict(), rel=1e-10
            )

    @pytest.mark.parametrize("steps", [None, "3:8"])
    def test_confidence_over_any_window(self, out: Path, steps: str | None) -> None:
        """The estimates are sums of the tables; errors come from sums over the replicates."""
        tables = lcray.open(out)
        found = tables.confidence(steps=steps).set_index(["split", "quantity", "layer"])
        layers, intervals = tables.layers(steps=steps), tables.intervals(steps=steps)
        for split in ("train", "val"):
            mine = intervals[intervals["split"] == split]
            expected = {
                ("loss_change", ""): mine["loss_change"].sum(),
                ("lc", ""): mine["lc"].sum(),
            }
            for name, rows in layers[layers["split"] == split].groupby("layer", observed=True):
                expected["lc", str(name)] = rows["lc"].sum()
            assert list(found.loc[split].index) == list(expected)
            assert found.loc[split]["estimate"].to_dict() == pytest.approx(expected, rel=1e-12)
        assert (found.loc["val"]["se"] == 0).all()
        whole, by_layer = tables.replicates(steps=steps), tables.replicate_layers(steps=steps)
        for key, rows, column in (
            (("loss_change", ""), whole, "loss_change"),
            (("lc", ""), whole, "lc"),
            (("lc", "2.bias"), by_layer[by_layer["layer"] == "2.bias"], "lc"),
        ):
            sums = rows.groupby("replicate")[column].sum().to_numpy()
            error = sums.std(ddof=1) / math.sqrt(10) * math.sqrt(1 - 10 / 17)
            row = found.loc[("train", *key)]
            assert row["se"] == pytest.approx(error, rel=1e-9)
            assert row["high"] - row["low"] == pytest.approx(2 * 2.2621572 * error, rel=1e-7)

    def test_intervals_that_are_not_ok_count_nothing(self, tmp_path: Path) -> None:
        """On planted tables: shares ¼, ⅜, ⅜ of 2, 3 and 3 samples, of 20."""
        world = planting.make_world(bad={("train", 4): "nonfinite_gradient"})
        planting.write_analysis(tmp_path, world.plan)
        for span in world.plan.spans:
            rows = planting.rows(world, "intervals", planting.span_range(world, span))
            for row in rows:
                if row["status"] != "ok":
                    row["loss_change"] = 100.0
            planting.write_span(tmp_path, world, span, rows={"intervals": rows})
        reduce(tmp_path)
        found = lcray.open(tmp_path).confidence().set_index(["split", "quantity", "layer"])
        for split in ("val", "train"):
            ts = [t for t in range(6) if world.ok(split, t)]
            change = sum(world.loss[split][t + 1] - world.loss[split][t] for t in ts)
            row = found.loc[(split, "loss_change", "")]
            assert row["estimate"] == pytest.approx(change, rel=1e-12)
            lc = sum(world.lc[split, "a.bias"][t].sum() for t in ts)
            row = found.loc[(split, "lc", "a.bias")]
            assert row["estimate"] == pytest.approx(lc, rel=1e-12)
            parts = np.zeros(3)
            for line in planting.rows(world, "replicate_layers", range(6)):
                if (line["split"], line["layer"]) == (split, "a.bias"):
                    parts[line["replicate"]] += line["lc"]
            spread = (np.array(planting.DRAWN) ** 2 * (parts - lc) ** 2).sum()
            error = math.sqrt((1 - 8 / 20) * spread / (1 - (4 + 9 + 9) / 64))
            assert row["se"] == pytest.approx(error, rel=1e-9)

    @pytest.mark.slow
    @pytest.mark.ray
    @pytest.mark.usefixtures("ray_cluster")
    def test_workers_change_nothing(self, out: Path, plain_run: Path, tmp_path: Path) -> None:
        plan, resources = lcray.open(out).plan, lcray.Resources(workers=3)
        lcray.analyze(plain_run, "scenes:plain", tmp_path / "out", plan=plan, resources=resources)
        assert scenes.tables(tmp_path / "out") == scenes.tables(out)

    def test_layers_levels_and_steps_are_chosen(self, out: Path) -> None:
        tables = lcray.open(out)
        found = tables.confidence(layers="2.*", level=0.5)
        assert found[found["split"] == "train"]["layer"].tolist() == ["", "", "2.weight", "2.bias"]
        whole = tables.confidence()
        width = [(f["high"] - f["low"])[0] for f in (found, whole)]
        assert width[0] == pytest.approx(width[1] * quantile(0.5, 9) / quantile(0.95, 9))
        for options in ({"steps": "x"}, {"layers": "nosuch*"}, {"level": 2.0}):
            with pytest.raises(UsageError):
                tables.confidence(**options)  # type: ignore[arg-type]

    def test_spans_and_resumption_change_nothing(
        self, out: Path, plain_run: Path, tmp_path: Path, inline: None
    ) -> None:
        """Under one plan bit for bit, whatever was lost; with other spans to rounding."""
        again = tmp_path / "again"
        plan = lcray.open(out).plan
        lcray.analyze(plain_run, "scenes:plain", again, plan=plan)
        (again / "shards" / plan.spans[1].name / "commit.json").unlink()
        lcray.analyze(plain_run, "scenes:plain", again, plan=plan)
        assert scenes.tables(again) == scenes.tables(out)
        other = tmp_path / "other"
        lcray.analyze(plain_run, "scenes:plain", other, **OPTIONS | {"span_length": 2})
        for table in ("replicates", "replicate_layers"):
            a, b = (lcray.open(path).table(table) for path in (out, other))
            assert np.allclose(a["lc"], b["lc"], rtol=1e-9, atol=1e-14)
            keys = [name for name in a.columns if a[name].dtype.kind != "f"]
            pd.testing.assert_frame_equal(a[keys], b[keys])

    def test_without_a_sample_the_tables_are_those_of_before(
        self, plain_run: Path, plain_out: Path, tmp_path: Path, inline: None
    ) -> None:
        """17 samples of 17: bit for bit what it is without the option."""
        made = tmp_path / "out"
        lcray.analyze(plain_run, "scenes:plain", made, samples=17, span_length=3, elements=True)
        there, here = scenes.tables(plain_out), scenes.tables(made)
        for tables in (there, here):
            del tables["manifest.json"]
        assert here == there
        assert (lcray.open(made).confidence()["se"] == 0).all()

    def test_the_draw_is_recorded_and_shown(self, out: Path) -> None:
        results = lcray.open(out)
        train, val = results.plan.splits
        assert (train.n_samples, train.drawn_from, val.drawn_from) == (10, 17, None)
        assert train.replicate_weights == (1.0,) * 10 and val.replicate_weights == ()
        (note,) = results.notes
        assert note.startswith("split 'train': 10 of 17 samples, drawn at random with seed 5:")
        text = shown(summary(results))
        found = results.confidence().set_index(["split", "quantity", "layer"])
        change = found.loc[("train", "loss_change", "")]
        half = (change["high"] - change["low"]) / 2
        assert "All of the data, 95% confidence" in text and note in text
        assert f"{change['estimate']:+.4f} ± {half:.4f}" in text

    def test_plans_say_what_is_drawn(self, plain_run: Path, inline: None) -> None:
        report: PlanReport = lcray.plan(plain_run, "scenes:plain", **OPTIONS)
        assert "train (10 of 17 samples, seed 5, in 10 replicates), val (6 samples)" in shown(
            plan_table(report)
        )
        rows = report.estimate.rows
        assert (rows["replicates"], rows["replicate_layers"]) == (12 * 10, 12 * 10 * 4)


class TestRefusals:
    @pytest.mark.parametrize("options", [{"samples": 1}, {"samples": 0}, {"sample_seed": -1}])
    def test_settings(self, options: dict[str, int]) -> None:
        with pytest.raises(UsageError, match=r"samples \d|sample-seed -1"):
            make_settings(options)

    @pytest.mark.parametrize(
        "change",
        [
            {"drawn_from": None},
            {"drawn_from": 10},
            {"replicate_weights": ()},
            {"replicate_weights": (10.0,)},
            {"replicate_weights": (1.0,) * 11},
            {"replicate_weights": (-1.0, 2.0)},
            {"replicate_weights": (0.0, 0.0)},
            {"total_weight": 11.0},
            {"replicate_weights": (math.nan, 1.0)},
            {"replicate_weights": (1.0, math.inf)},
        ],
    )
    def test_plans_with_impossible_samples(self, out: Path, change: dict[str, Any]) -> None:
        plan = lcray.open(out).plan
        assert read_plan(plan.to_dict()) == plan
        wrong = replace(plan, splits=(replace(plan.splits[0], **change), plan.splits[1]))
        with pytest.raises(ValueError, match=r"an impossible sample|weights is not finite"):
            read_plan(wrong.to_dict())

    def test_data_that_are_not_those_of_the_plan(
        self, out: Path, plain_run: Path, tmp_path: Path
    ) -> None:
        plan = lcray.open(out).plan
        split: SplitPlan = replace(plan.splits[0], drawn_from=18)
        other = replace(plan, splits=(split, plan.splits[1]))
        work = Workspace(scenes.plain, str(plain_run), plan.settings)
        with pytest.raises(TaskError, match="'train': sample differs from the plan"):
            work.run(other, plan.spans[0], tmp_path / "out", "a")

    def test_batch_statistics(self) -> None:
        ends = [scenes.build_batchnorm().state_dict() for _ in range(2)]
        with pytest.raises(UsageError, match="use --batch-norm running"):
            allocate(scenes.batchnorm, *ends, samples=10, batch_norm="batch")
        found = allocate(scenes.batchnorm, *ends, samples=17, batch_norm="batch")
        assert (found["train"].confidence()["se"] == 0).all()

    def test_tables_of_samples_that_were_not_asked_for(self, plain_out: Path) -> None:
        with pytest.raises(UsageError, match="analyze with --samples"):
            lcray.open(plain_out).replicates()


def test_row_groups_of_shards_hold_one_split(out: Path) -> None:
    for path in out.glob("shards/*/replicate*.parquet"):
        with pq.ParquetFile(path) as file:
            assert set(file.read(["split"]).column("split").to_pylist()) == {"train"}
