"""The pieces of the benchmarks: that they measure what they say. Nothing here is timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
import torch
import torch.nn.functional as F
import twin
from benchmarks import adapter, checks, economy, growth, machine, plot, speed
from benchmarks.naive import allocate
from benchmarks.player import Player, serve
from benchmarks.suite import ROOT, Bench, Row, chosen, format_table, load, save
from benchmarks.worker import Worker
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcray.tasks.task import Task

ROWS = [Row("a net", "seconds", 0.25, "s"), Row("b", "samples_per_second", 12345.678, "1/s")]


def test_rows_come_back_from_the_file_and_one_is_one_object(tmp_path: Path) -> None:
    save(ROWS, tmp_path / "bench.json")
    plain = json.loads((tmp_path / "bench.json").read_text())
    assert plain[0] == {"case": "a net", "metric": "seconds", "value": 0.25, "unit": "s"}
    assert load(tmp_path / "bench.json") == ROWS


def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save([Row("a", "m", math.nan, "s")], tmp_path / "bench.json")


def test_the_table_has_a_line_for_each_row_in_columns() -> None:
    lines = format_table(ROWS).splitlines()
    assert lines[1].split("  ")[0] == "a net"
    assert lines[2].split() == ["b", "samples_per_second", "1.235e+04", "1/s"]
    assert lines[0].index("unit") == lines[2].index("1/s")


def test_cases_are_chosen_by_words_in_their_names() -> None:
    def nothing(bench: Bench) -> list[Row]:
        return []

    cases = {"speed/lenet": nothing, "economy/lenet": nothing, "memory": nothing}
    assert [*chosen(cases, [])] == [*cases]
    assert [*chosen(cases, ["lenet"])] == ["speed/lenet", "economy/lenet"]
    assert [*chosen(cases, ["memory", "speed"])] == ["speed/lenet", "memory"]
    with pytest.raises(ValueError, match=r"'lenett'.*economy/lenet"):
        chosen(cases, ["lenett"])


def test_without_data_the_command_says_what_to_set() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env={"LCRAY_DATA": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set LCRAY_DATA" in done.stderr.splitlines()[-1]


def test_requests_are_answered_in_order_by_one_object() -> None:
    answers: list[str] = []
    lines = [
        {"do": "string:Template", "template": "$a and $b"},
        {"do": "safe_substitute", "a": "x"},
        {"do": "substitute", "a": "x", "b": "y"},
    ]
    serve((json.dumps(line) for line in lines), answers.append)
    assert answers == ["null\n", '"x and $b"\n', '"x and y"\n']


def test_a_player_is_a_process_with_its_own_environment() -> None:
    with Player("string:Template", {"HOME": None}, template="$a") as player:
        player.send("substitute", a="1")
        player.send("substitute", a="2")
        assert [player.receive(), player.receive()] == ["1", "2"]
        with pytest.raises(RuntimeError, match="string:Template: its process ended with 1"):
            player.ask("no_such_method")


def test_the_naive_loop_gives_the_twins_values(plain_run: Path, plain_task: Task) -> None:
    files = sorted(plain_run.glob("step-*.safetensors"))[:3]
    assert not callable(plain_task.splits)
    data = plain_task.splits["train"]
    loader = DataLoader(TensorDataset(*data), batch_size=5)
    found = list(allocate(plain_task.model(), plain_task.loss, loader, files))
    states = [load_file(file) for file in files]
    for lc, before, after in zip(found, states, states[1:], strict=False):
        expected = twin_lc(plain_task, data, before, after)
        for name, values in expected.items():
            torch.testing.assert_close(lc[name].double(), values, rtol=1e-4, atol=1e-7)


def twin_lc(task: Task, data: Any, before: Any, after: Any) -> dict[str, torch.Tensor]:
    """Simpson's rule in float64 by `torch.func`, on all samples at once."""

    def mean_loss(state: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(model, state, (data[0].double(),))
        return F.cross_entropy(logits, data[1])

    model = task.model().double()
    a, b = ({k: v.double() for k, v in state.items()} for state in (before, after))
    nodes, weights, _ = twin.RULES["simpson"]
    total = {name: torch.zeros_like(value) for name, value in a.items()}
    for s, weight in zip(nodes, weights, strict=True):
        point = {name: a[name] + s * (b[name] - a[name]) for name in a}
        for name, g in torch.func.grad(mean_loss)(point).items():
            total[name] += weight * g * (b[name] - a[name])
    return total


def test_a_worker_counts_every_gradient_and_keeps_what_it_is_told_to(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter.GradientEngine, "evaluate", adapter.GradientEngine.evaluate)
    monkeypatch.setattr(adapter, "tune", lambda: None)
    calls = []
    whole = adapter.GradientEngine.evaluate

    def counted(self: Any, split: Any, out: Any, *rest: Any, **more: Any) -> Any:
        calls.append(out is not None)
        return whole(self, split, out, *rest, **more)

    monkeypatch.setattr(adapter.GradientEngine, "evaluate", counted)
    worker = Worker("scenes:plain", str(plain_run), "0:6", 3, {})
    plan = worker.draft()
    assert [len(steps) for steps in plan["spans"]] == [4, 4]
    worker.use(json.loads(json.dumps(plan)))
    calls.clear()
    answer = worker.round(1, str(tmp_path / "out"))
    assert answer["gradients"] == sum(calls) == 2 * 3 + 1
    assert 0 < answer["inside"] < answer["seconds"]
    assert len([*tmp_path.glob("out/shards/*/commit.json")]) == 1


def test_nested_calls_are_timed_once() -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0])
    watch = adapter.Stopwatch(lambda: next(ticks))
    inner = watch.wrap(lambda: None)
    watch.wrap(lambda: inner())()
    assert watch.seconds == 5.0
    with pytest.raises(ZeroDivisionError):
        watch.wrap(lambda: 1 / 0)()
    assert watch.seconds == 7.0


def answer(gradients: int, seconds: float, inside: float = 0.0, peak: float = 2**20) -> Any:
    return {"gradients": gradients, "seconds": seconds, "inside": inside, "peak_bytes": peak}


def test_ratios_are_medians_of_quotients_within_a_round() -> None:
    rounds = [
        # the naive loop: 1 gradient a second; the pair: 8 in 2 s; the single one: 4 in 2 s
        speed.Round(answer(5, 5.0), [answer(4, 2.0, 1.0), answer(4, 1.0, 0.5)], answer(4, 2.0), 80),
        speed.Round(answer(5, 1.0), [answer(4, 2.0, 1.0), answer(4, 2.0, 1.0)], answer(4, 4.0), 40),
        speed.Round(answer(5, 5.0), [answer(4, 1.0, 1.0), answer(4, 1.0, 0.0)], answer(4, 2.0), 80),
    ]
    found = {row.metric: row.value for row in speed.rows("net", rounds, samples=10, flops=0.5)}
    assert found["samples_per_second"] == 40.0
    assert found["naive_samples_per_second"] == 10.0
    assert found["ratio_to_naive"] == 4.0  # of 4, 0.8 and 8
    assert found["two_workers_over_one"] == 4.0  # of 2, 4 and 4
    assert found["share_of_peak"] == 0.5  # of 40·0.5/80, 40·0.5/40 and 80·0.5/80
    assert found["outside_gradients"] == 0.5
    assert found["peak_memory"] == 1.0


def test_checks_may_cost_a_batch_and_a_share_of_the_analysis() -> None:
    seconds = {"fresh": 2.0, "independence": 3.0, "batch": 4.0, "analysis": 500.0}
    found = {row.metric: row.value for row in checks.rows("net", seconds)}
    assert (found["fresh"], found["independence"], found["batch"]) == (2000.0, 3000.0, 4000.0)
    assert (found["over_batch"], found["over_20_intervals"]) == (5 / 4, 0.01)
    assert found["enough_intervals"] == 2  # 1 s too many, and 2 % of an interval are 0.5 s
    cheap = {row.metric: row.value for row in checks.rows("net", {**seconds, "batch": 6.0})}
    assert cheap["enough_intervals"] == 1


def test_flops_are_those_of_the_matrix_products() -> None:
    task = Task(
        lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)),
        {"train": (torch.randn(20, 7), torch.zeros(20, dtype=torch.long))},
        scenes.cross_entropy,
    )
    # Forward 2·7·5 + 2·5·3; backward the weights of both, and the input of the second one only.
    assert machine.count_flops(task) == 2 * (7 * 5 * 2 + 5 * 3 * 3)


@pytest.mark.parametrize("kind", ["sgemm", "conv"])
def test_the_work_of_a_rate_is_what_its_call_does(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    works = list({"sgemm": machine._sgemm, "conv": machine._conv}[kind]())
    for flops, call in works[:2]:
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == flops


def test_errors_of_a_rule_are_relative_to_the_dense_one() -> None:
    dense = economy.Found(
        cost=np.array([32.0, 32.0]),
        gap=np.zeros(2),
        loss_change=np.array([-1.0, -3.0]),
        converged=np.ones(2),
        layers=np.array([[-1.0, 0.5], [-2.0, -0.5]]),
        layer_se=np.full((2, 2), math.nan),
        elements=np.array([[3.0, 4.0], [0.0, 10.0]]),
    )
    found = economy.Found(
        cost=np.array([1.0, 2.0]),
        gap=np.array([0.1, -0.1]),
        loss_change=np.array([-1.0, -3.0]),
        converged=np.array([1.0, 0.0]),
        layers=np.array([[-1.0, 0.3], [-1.8, -0.5]]),
        layer_se=np.full((2, 2), math.nan),
        elements=np.array([[3.0, 4.5], [3.0, 10.0]]),
    )
    assert economy.figures(found, dense) == pytest.approx(
        {
            "gradients_per_interval": 1.5,
            "gap": 0.05,
            "unconverged": 0.5,
            "layer_error": 0.4 / 4,
            "parameter_error": 0.2,  # the middle of 0.5/5 and 3/10
            "parameter_error_worst": 0.3,
        }
    )
    sampled = replace(
        found,
        converged=np.full(2, math.nan),
        layer_se=np.array([[0.0, 0.1], [math.nan, 0.05]]),
    )
    stated = economy.figures(sampled, dense)
    assert "unconverged" not in stated
    assert stated["unstated"] == 0.25
    # Of N(0, σ²), the mean of |.| is σ·√(2/π); |LC| is 1, 0.5 and 0.5 where σ is given.
    assert stated["stated_error"] == pytest.approx(math.sqrt(2 / math.pi) * 0.15 / 2.0)


def test_shards_are_read_as_arrays_by_interval(plain_run: Path, tmp_path: Path) -> None:
    workspace = adapter.open_workspace(
        "scenes:plain", plain_run, {"splits": ["train"], "elements": True}, "0:3"
    )
    adapter.run_span(workspace, adapter.draft(workspace, 3), 0, tmp_path)
    found = economy.read(tmp_path)
    assert found.elements.shape == (3, 43)
    layers = np.add.reduceat(found.elements, [0, 20, 25, 40], axis=1)  # 5x4, 5, 3x5, 3
    np.testing.assert_allclose(layers, found.layers, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.layers.sum(1) - found.loss_change, found.gap, atol=1e-12)
    assert found.cost.tolist() == [2, 2, 2]
    assert np.isnan(found.layer_se).all()


def test_a_sample_of_the_data_costs_its_share(plain_run: Path) -> None:
    """Of 17 samples, 8 cost two gradients of 8/17 each: as near to one as whole samples come."""
    dense = {"rule": "simpson*2", "dtype": "float64"}
    comparison = economy.Comparison("scenes:plain", str(plain_run), "0:3", {}, dense)
    assert comparison.sample(1.0)["gradients_per_interval"] == pytest.approx(2 * 8 / 17)
    found = comparison.sample(2.0)
    assert found["gradients_per_interval"] == 2.0
    assert found == pytest.approx(comparison.compare({}), rel=1e-3)  # the order of the batches


def test_only_rules_that_exist_are_compared() -> None:
    assert [adapter.has_rule(name) for name in ("simpson", "no-such-rule")] == [True, False]


def test_a_line_is_fitted_with_its_largest_residual() -> None:
    assert growth.fit_line([1, 2, 5], [5.0, 7.0, 13.0]) == pytest.approx((2.0, 3.0, 0.0))
    # Through (0, 0), (1, 0), (2, 3): slope 1.5, intercept -0.5, residuals 0.5, -1, 0.5.
    assert growth.fit_line([0, 1, 2], [0.0, 0.0, 3.0]) == pytest.approx((1.5, -0.5, 1 / 3))


def test_growth_is_drawn_from_its_rows(tmp_path: Path) -> None:
    rows = [r for axis in plot.AXES for r in growth.lines(axis, [1, 2, 4], [1.0, 2.0, 4.5])]
    assert plot.points(rows, "samples") == ([1, 2, 4], [1.0, 2.0, 4.5])
    plot.draw(rows, tmp_path / "docs" / "growth.svg")
    assert "<svg" in (tmp_path / "docs" / "growth.svg").read_text()
    with pytest.raises(ValueError, match="against splits"):
        plot.draw([row for row in rows if "splits" not in row.case], tmp_path / "growth.svg")
