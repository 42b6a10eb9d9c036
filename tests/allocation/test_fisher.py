"""Fisher information: its value, its error, its way into the tables, and what LC is beside it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
import torch
import torch.nn.functional as F
from scenes import by_one_worker, cross_entropy
from torch import Tensor, nn

import lcray
from lcray.allocation.fisher.fisher import FisherMeter, Traces, ratio_of_means
from lcray.allocation.path import Point
from lcray.errors import TaskError, UsageError
from lcray.execution.worker.workbench import Workbench
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_plan, make_settings
from lcray.tables.shards.writer import read_commit
from lcray.tasks.task import Task


def sample_classes(output: Tensor, batch: Any, generator: torch.Generator) -> Any:
    """Classes drawn from the softmax of logits [n, C]."""
    drawn = torch.multinomial(output.softmax(1), 1, generator=generator)[:, 0]
    return (batch[0], drawn, *batch[2:])


def weighted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return cross_entropy(model, batch), batch[2]


def meter(task: Task, **options: Any) -> tuple[FisherMeter, Workbench]:
    settings = make_settings({"dtype": "float64", "fisher": 1, "fisher_samples": 10**6, **options})
    bench = Workbench(task, settings)
    point = Point(0, bench.flat.theta.clone(), {})
    return FisherMeter(bench.flat, bench.engine, task, settings, bench.fisher_splits, point), bench


def measured(task: Task, step: int = 0, **options: Any) -> tuple[dict[str, int], Traces]:
    """At the weights that the task builds: the row of each layer, and the traces."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        flat = Workbench(task, make_settings({"dtype": "float64"})).flat
        torch.manual_seed(3)
        found, bench = meter(task, **options)
    point = Point(step, flat.theta.clone(), {})
    traces = found.measure(bench.fisher_splits[0], point)
    names = [bench.flat.layers[n].name for n in traces.numbers]
    return {name: row for row, name in enumerate(names)}, traces


def data(n: int, seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def softmax_regression() -> nn.Module:
    return nn.Linear(3, 4)


def regression(n: int, seed: int = 0) -> Task:
    return Task(
        softmax_regression,
        {"train": data(n, seed)},
        cross_entropy,
        sample_targets=sample_classes,
    )


def analytic(x: Tensor, model: nn.Module) -> tuple[float, float]:
    """Σ_c p_c(1 − p_c)·|x|² for the weight and Σ_c p_c(1 − p_c) for the bias, means over x."""
    p = model(x).softmax(1)
    spread = (p * (1 - p)).sum(1)
    return float((spread * x.square().sum(1)).mean()), float(spread.mean())


def built() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return softmax_regression().double().requires_grad_(False)


class TestValue:
    def test_true_of_a_softmax_regression(self) -> None:
        rows, traces = measured(regression(4000))
        assert traces.true is not None
        for name, expected in zip(
            ("weight", "bias"), analytic(data(4000)[0], built()), strict=True
        ):
            trace, error = traces.true[0][rows[name]], traces.true[1][rows[name]]
            assert error < 0.03 * expected
            assert abs(trace - expected) < 3 * error

    def test_empirical_of_a_softmax_regression(self) -> None:
        rows, traces = measured(regression(60))
        x, y = data(60)
        residual = (built()(x).softmax(1) - F.one_hot(y, 4)).square().sum(1)
        expected = float((residual * x.square().sum(1)).mean())
        assert traces.empirical[0][rows["weight"]] == pytest.approx(expected, rel=1e-12)
        assert traces.empirical[0][rows["bias"]] == pytest.approx(float(residual.mean()), rel=1e-12)
        assert traces.n_items == 60

    def test_weights_are_those_of_the_mean(self) -> None:
        x, y = data(30)
        w = torch.linspace(0, 2, 30, dtype=torch.float64)  # the first counts nothing
        task = Task(
            softmax_regression,
            {"train": (x, y, w)},
            weighted,
            sample_targets=sample_classes,
        )
        rows, traces = measured(task)
        residual = (built()(x).softmax(1) - F.one_hot(y, 4)).square().sum(1) * x.square().sum(1)
        expected = float((w * residual).sum() / w.sum())
        assert traces.empirical[0][rows["weight"]] == pytest.approx(expected, rel=1e-12)
        assert traces.n_items == 29

    def test_tied_weights_on_sequences_by_single_samples(self) -> None:
        """Padding has weight 0; G is the sum over a sequence, Σ|G|² over the weight of all."""
        task = Task(scenes.Tied, scenes.sentences, scenes.next_token)
        rows, traces = measured(task, fisher_kind="empirical")
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = scenes.Tied().double()
        squares, mass = dict.fromkeys(rows, 0.0), 0.0
        for tokens in scenes.sentences()["train"][0]:
            losses, weights = scenes.next_token(model, (tokens[None],))
            model.zero_grad()
            (losses * weights).sum().backward()
            mass += float(weights.sum())
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                squares[name] += float(parameter.grad.square().sum())
        assert traces.n_items == mass
        for name, row in rows.items():
            assert traces.empirical[0][row] == pytest.approx(squares[name] / mass, rel=1e-10)

    def test_frozen_layers_have_none(self) -> None:
        def model() -> nn.Module:
            net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4))
            net[0].requires_grad_(False)
            return net

        task = Task(model, {"train": data(10)}, cross_entropy, sample_targets=sample_classes)
        rows, _ = measured(task)
        assert list(rows) == ["2.weight", "2.bias"]


class Odd(nn.Module):
    """What has no closed form: a product by hand, and a layer that sees samples along axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        repeated = (x * self.scale).expand(len(x), *x.shape)  # as many positions as samples
        return self.head(torch.tanh(self.mix(repeated)).mean(0))


class Branching(Odd):
    """As `Odd`, and what it does depends on a value, so that it cannot be vectorised."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) < 1e9 else -x)


class Twice(nn.Module):
    """Uses a weight twice, once by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + x.square() @ self.head.weight.T  # type: ignore[no-any-return]


class Scans(nn.Module):
    """Positions come first, and there are as many as samples in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 3]
        return self.mix(x.transpose(0, 1)).cumsum(0).sin().sum(0)


def by_single_samples(task: Task) -> dict[str, float]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = task.model().double()
    x, y = task.splits["train"]  # type: ignore[index]
    total = {name: 0.0 for name, _ in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        task.loss(model, (x[i : i + 1], y[i : i + 1])).sum().backward()  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += float(parameter.grad.square().sum()) / len(x)
    return total


class TestOtherWays:
    @pytest.mark.parametrize(
        ("model", "closed", "vectorised"),
        [
            (Odd, {"head.weight", "head.bias"}, True),
            (Branching, {"head.weight", "head.bias"}, False),
        ],
    )
    def test_what_has_no_closed_form(self, model: Any, closed: set[str], vectorised: bool) -> None:
        task = Task(model, {"train": data(20)}, cross_entropy)
        found, bench = meter(task, fisher_kind="empirical")
        names = {bench.flat.layers[n].name for n in found._scores.closed}
        assert names == closed and found._scores.vectorised == vectorised
        rows, traces = measured(task, fisher_kind="empirical")
        for name, expected in by_single_samples(task).items():
            assert traces.empirical[0][rows[name]] == pytest.approx(expected, rel=1e-10)

    def test_positions_that_could_be_taken_for_samples(self) -> None:
        """The shapes alone would allow the closed form; the numbers do not."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 8, 3, generator=generator, dtype=torch.float64)
        task = Task(Scans, {"train": (x, torch.arange(8) % 4)}, cross_entropy)
        found, _ = meter(task, fisher_kind="empirical")
        assert found._scores.closed == frozenset()
        rows, traces = measured(task, fisher_kind="empirical")
        for name, expected in by_single_samples(task).items():
            assert traces.empirical[0][rows[name]] == pytest.approx(expected, rel=1e-10)

    def test_samples_without_weight_tell_nothing(self) -> None:
        """A product that is not seen, and batches that cannot show it, as they count nothing."""
        x, y = data(160)
        weights = (torch.arange(160) >= 80).double()
        task = Task(Twice, {"train": (x, y, weights)}, weighted)
        rows, traces = measured(task, fisher_kind="empirical")
        counted = Task(Twice, {"train": (x[80:], y[80:])}, cross_entropy)
        for name, expected in by_single_samples(counted).items():
            assert traces.empirical[0][rows[name]] == pytest.approx(expected, rel=1e-10)


class TestError:
    def test_of_a_ratio_by_hand(self) -> None:
        squares = np.array([[1.0], [4.0], [1.0]])
        ratio, error = ratio_of_means(squares, np.array([1.0, 2.0, 1.0]))
        # 6/4; residuals −0.5, 1, −0.5: √(3/2 · 1.5) / 4
        assert ratio == [1.5] and error == pytest.approx([1.5 / 4], rel=1e-14)
        ratio, error = ratio_of_means(squares[:1], np.array([2.0]))
        assert ratio == [0.5] and np.isnan(error).all()

    @pytest.mark.parametrize("kind", ["true", "empirical"])
    def test_by_monte_carlo(self, kind: str) -> None:
        """Over data drawn anew, estimates spread as their errors say: 200 times, to 15 %."""
        found, errors = [], []
        for seed in range(200):
            rows, traces = _QUICK.measure(seed)
            trace, error = getattr(traces, kind)
            found.append(trace[rows["weight"]])
            errors.append(error[rows["weight"]])
        assert np.std(found, ddof=1) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.15)


class _Quick:
    """The regression at the same weights, on other samples each time; one workbench for all."""

    def __init__(self) -> None:
        self._made: tuple[FisherMeter, Workbench] | None = None

    def measure(self, seed: int) -> tuple[dict[str, int], Traces]:
        from dataclasses import replace

        if self._made is None:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self._made = meter(regression(64))
                self._theta = torch.cat([p.detach().flatten() for p in built().parameters()])
        found, bench = self._made
        batches = [data(64, seed)]
        split = replace(bench.fisher_splits[0], batches=batches, batch_sizes=(64,))  # type: ignore[arg-type]
        traces = found.measure(split, Point(seed, self._theta, {}))
        return {bench.flat.layers[n].name: i for i, n in enumerate(traces.numbers)}, traces


_QUICK = _Quick()


class TestRescaling:
    """science's third invariant: θ' = Dθ of the same function has the same LC, another FIM."""

    def net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))

    def test_same_function_same_lc_another_fisher(self) -> None:
        torch.manual_seed(0)
        x, y = data(50)
        before = self.net().double().state_dict()
        after = {k: v + 0.05 * torch.randn(v.shape, dtype=v.dtype) for k, v in before.items()}
        factor = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 0.5, "2.bias": 1.0}

        def scaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: factor[name] * value for name, value in state.items()}

        task = Task(self.net, {"train": (x, y)}, cross_entropy, sample_targets=sample_classes)
        one = lcray.allocate(task, before, after, dtype="float64")["train"]
        two = lcray.allocate(task, scaled(before), scaled(after), dtype="float64")["train"]
        assert one.loss_change == pytest.approx(two.loss_change, rel=1e-12)
        for name, lc in one.elements.items():
            torch.testing.assert_close(
                torch.as_tensor(two.elements[name]), torch.as_tensor(lc), rtol=1e-10, atol=1e-15
            )

        found, bench = meter(task)
        traces = []
        for state in (before, scaled(before)):
            theta = torch.cat([state[la.name].flatten() for la in bench.flat.layers])
            traces.append(found.measure(bench.fisher_splits[0], Point(0, theta, {})))
        for row, number in enumerate(traces[0].numbers):
            name = bench.flat.layers[number].name
            for kind in ("true", "empirical"):
                plain, other = (getattr(t, kind)[0][row] for t in traces)
                # ∂ℓ/∂θ' = ∂ℓ/∂θ / d; the targets drawn are the same, as the function is.
                assert other == pytest.approx(plain / factor[name] ** 2, rel=1e-10)


class TestRefusals:
    def test_without_sample_targets(self, plain_run: Path) -> None:
        with pytest.raises(TaskError, match=r"sample_targets.*--fisher-kind empirical"):
            Workspace(scenes.plain, str(plain_run), make_settings({"fisher": 1}))

    def test_targets_that_the_generator_does_not_decide(self, plain_run: Path) -> None:
        def guess(output: Tensor, batch: Any, generator: torch.Generator) -> Any:
            return batch[0], torch.randint(3, (len(batch[1]),))

        task = Task(scenes.build_plain, scenes.points, cross_entropy, sample_targets=guess)
        work = Workspace(task, str(plain_run), make_settings({"fisher": 1}))
        with pytest.raises(TaskError, match="'train': targets differ the second time; draw them"):
            work.probe()

    def test_batch_statistics(self) -> None:
        with pytest.raises(UsageError, match=r"single samples.*--batch-norm running"):
            make_settings({"fisher": 1, "batch_norm": "batch"})

    def test_no_running_statistics(self) -> None:
        def model() -> nn.Module:
            return nn.Sequential(
                nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4)
            )

        with pytest.raises(TaskError, match="BatchNorm layers without running statistics"):
            meter(Task(model, {"train": data(9)}, cross_entropy), fisher_kind="empirical")

    def test_samples_that_depend_on_each_other(self) -> None:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, (batch[0] - batch[0].mean(0), batch[1]))

        task = Task(softmax_regression, {"train": data(9)}, loss)
        with pytest.raises(TaskError, match="no sample may depend on another"):
            meter(task, fisher_kind="empirical")

    def test_uneven_items(self) -> None:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch)[batch[0][:, 0] > 0]

        task = Task(softmax_regression, {"train": data(9)}, loss)
        with pytest.raises(TaskError, match=r"\d items of \d samples|losses differ from the batch"):
            meter(task, fisher_kind="empirical")

    def test_no_step_is_a_multiple(self) -> None:
        with pytest.raises(UsageError, match="none of the steps 1 to 6 is a multiple"):
            make_plan(range(1, 7), make_settings({"fisher": 7}), (), ())

    @pytest.mark.usefixtures("inline")
    def test_a_run_that_grows_may_reach_one_later(self, plain_run: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="none of the steps 1 to 12 is a multiple"):
            lcray.analyze(plain_run, TASK, tmp_path / "out", steps="1:", fisher=20)
        found = lcray.analyze(
            plain_run, TASK, tmp_path / "out", steps="1:", fisher=20, follow=True, idle=0.1
        )
        assert found.fisher().empty and lcray.verify(tmp_path / "out").ok

    @pytest.mark.parametrize("options", [{"fisher": 0}, {"fisher_samples": 0}, {"fisher_seed": -1}])
    def test_numbers_out_of_range(self, options: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            make_settings(options)

    def test_output_that_cannot_be_known(self) -> None:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model.forward(batch[0]), batch[1], reduction="none")

        task = Task(softmax_regression, {"train": data(9)}, loss, sample_targets=sample_classes)
        with pytest.raises(TaskError, match="does not call the model exactly once"):
            measured(task)


TASK = Task(
    scenes.build_plain,
    scenes.points,
    cross_entropy,
    groups=scenes.classes,
    sample_targets=sample_classes,
)
WRITTEN = Task(  # writes into the batch that it is given
    scenes.build_plain,
    scenes.points,
    cross_entropy,
    sample_targets=lambda out, batch, g: [batch[1].copy_(sample_classes(out, batch, g)[1]), batch][
        1
    ],
)


analyze = partial(by_one_worker, batch_size=8)


class TestTables:
    def test_every_third_step_and_however_spans_are_cut(
        self, plain_run: Path, tmp_path: Path
    ) -> None:
        one = analyze(TASK, plain_run, tmp_path / "one", 12, fisher=3, fisher_samples=10)
        two = analyze(TASK, plain_run, tmp_path / "two", 5, fisher=3, fisher_samples=10)
        frame = one.fisher()
        assert two.fisher().equals(frame)
        assert frame["step"].unique().tolist() == [0, 3, 6, 9, 12]
        assert len(frame) == 2 * 5 * 4
        assert frame.notna().all().all()
        assert frame.groupby("split", observed=True)["n_items"].unique().map(list).to_dict() == {
            "train": [10],
            "val": [6],
        }
        assert lcray.verify(tmp_path / "two").ok

    def test_a_plan_without_the_tables_takes_no_time_for_them(
        self, plain_run: Path, tmp_path: Path
    ) -> None:
        """So is that of a second pass, for traces."""
        options = {"fisher": 1, "samples": 5, "batch_size": 8}
        work = Workspace(TASK, str(plain_run), make_settings(options))
        splits = work.probe().splits
        plan = make_plan(work.series.steps, work.settings, work.flat.layers, splits)
        assert {"fisher", "replicates", "replicate_layers"} < set(plan.tables)
        assert work.run(
            replace(plan, tables=("intervals", "layers")), plan.spans[0], tmp_path, "a"
        ).committed
        commit = read_commit(tmp_path, plan.spans[0])
        assert commit is not None and commit.tables == {"intervals", "layers", "borders"}

    @pytest.mark.slow
    def test_the_rest_is_as_without(self, plain_run: Path, tmp_path: Path) -> None:
        plain = analyze(TASK, plain_run, tmp_path / "plain", 5)
        other = analyze(TASK, plain_run, tmp_path / "other", 5, fisher=1)
        assert set(other.tables) - set(plain.tables) == {"fisher"}
        for table in plain.tables:
            assert other.table(table).equals(plain.table(table)), table

    def test_empirical_alone(self, plain_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        frame = analyze(
            scenes.plain, plain_run, out, 12, fisher=12, fisher_kind="empirical"
        ).fisher()
        assert frame["trace_true"].isna().all() and frame["trace_empirical"].notna().all()
        both = analyze(TASK, plain_run, tmp_path / "both", 12, fisher=12).fisher()
        assert both["trace_empirical"].equals(frame["trace_empirical"])

    @pytest.mark.slow
    def test_targets_that_are_written_into_the_batch(self, plain_run: Path, tmp_path: Path) -> None:
        one = analyze(TASK, plain_run, tmp_path / "one", 12, fisher=6).fisher()
        two = analyze(WRITTEN, plain_run, tmp_path / "two", 12, fisher=6).fisher()
        assert two.equals(one)

    def test_a_run_that_grows(self, plain_run: Path, tmp_path: Path) -> None:
        """A span has the rows of the steps it ends intervals at, so none is there twice."""
        short = Path(shutil.copytree(plain_run, tmp_path / "run"))
        for step in range(7, 13):
            scenes.checkpoint(short, step).unlink()
        with pytest.MonkeyPatch.context() as patch:
            scenes.work_inline(patch)
            options: dict[str, Any] = {"fisher": 2, "batch_size": 8, "span_length": 3}
            lcray.analyze(short, TASK, tmp_path / "out", **options)
            for step in range(7, 13):
                shutil.copy(scenes.checkpoint(plain_run, step), short)
            grown = lcray.analyze(short, TASK, tmp_path / "out", **options)
        assert lcray.verify(tmp_path / "out").ok
        assert len(grown.fisher()) == 2 * 7 * 4

    @pytest.mark.slow
    @pytest.mark.ray
    def test_any_number_of_workers(self, plain_run: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"fisher": 1, "batch_size": 8, "span_length": 3}
        for workers in (1, 2):
            resources = lcray.Resources(workers=workers)
            lcray.analyze(plain_run, TASK, tmp_path / str(workers), resources=resources, **options)
        assert scenes.tables(tmp_path / "1") == scenes.tables(tmp_path / "2")

    def test_the_plan_says_what_it_costs(self, plain_run: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            scenes.work_inline(patch)
            found = lcray.plan(plain_run, TASK, fisher=3, batch_size=8)
            plain = lcray.plan(plain_run, TASK, batch_size=8)
        assert found.estimate.rows["fisher"] == 2 * 5 * 4
        assert "fisher" not in plain.estimate.rows


@pytest.mark.parametrize(
    ("given", "every"), [([], None), (["--fisher"], 1), (["--fisher=3"], 3), (["--fisher", "5"], 5)]
)
def test_the_option_with_and_without_a_number(given: list[str], every: int | None) -> None:
    from lcray.cli.app import analyze as command

    words = ["run", *given, "--task", "m:task", "--out", "out"]
    assert command.make_context("analyze", words).params["fisher"] == every
