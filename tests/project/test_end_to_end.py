"""The examples through the command line, on real data: recorded, analyzed, verified, and checked.

Slow, and in need of the data sets; the demo covers the same ground in the fast tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import EXAMPLES
from twin import Twin

import lcray
from lcray.checkpoints import open_series
from lcray.tasks.task import load_task

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def record(name: str, run: Path, data: Path, *, steps: int, samples: int) -> None:
    _call(data, samples, str(EXAMPLES / f"{name}.py"), "--run", str(run), "--steps", str(steps))


def analyze(name: str, run: Path, out: Path, data: Path, samples: int, *options: str) -> Any:
    task = f"{EXAMPLES / name}.py:task"
    command = ["-m", "lcray", "analyze", str(run), "--task", task, "--out", str(out)]
    command += ["--no-local", *options]
    _call(data, samples, *command)
    verified = lcray.verify(out)
    assert verified.ok, verified.problems
    return lcray.open(out)


def _call(data: Path, samples: int, *command: str) -> None:
    environment = {
        **os.environ,
        "LCRAY_DATA": str(data),
        "LCRAY_SAMPLES": str(samples),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


def test_lenet_closes(data_folder: Path, tmp_path: Path) -> None:
    """The bounds of [LCA] on fewer digits: 0.3 % of the change, 0.1 % of Σ|change| refined."""
    samples = 500
    record("mnist_lenet", tmp_path / "run", data_folder, steps=30, samples=samples)
    plain = analyze("mnist_lenet", tmp_path / "run", tmp_path / "plain", data_folder, samples)
    refined = analyze(
        "mnist_lenet", tmp_path / "run", tmp_path / "refined", data_folder, samples, "--refine"
    )
    rows = plain.intervals()
    train = rows[rows["split"] == "train"]
    assert len(train) == 30 and (rows["status"] == "ok").all()
    assert abs(train["gap"].sum()) <= 0.003 * abs(train["loss_change"].sum())
    for _, split in refined.intervals().groupby("split", observed=True):
        assert split["gap"].abs().sum() <= 0.001 * split["loss_change"].abs().sum()


def test_lenet_agrees_with_the_twin(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter of LeNet, in float64 on 48 digits: same nodes, one sample at a time."""
    samples, run = 48, tmp_path / "run"
    record("mnist_lenet", run, data_folder, steps=4, samples=samples)
    options = ("--dtype", "float64", "--split", "train")
    out = analyze("mnist_lenet", run, tmp_path / "out", data_folder, samples, *options)
    monkeypatch.setenv("LCRAY_DATA", str(data_folder))
    monkeypatch.setenv("LCRAY_SAMPLES", str(samples))
    task = load_task(f"{EXAMPLES / 'mnist_lenet'}.py:task")
    images, labels = task.splits()["train"]  # type: ignore[operator]
    chunks = [(images[i : i + 1], labels[i : i + 1]) for i in range(samples)]
    twin = Twin(task.model, task.loss, chunks, task.groups)
    series = open_series(run)
    states = [series.read(step).tensors for step in series.steps]
    intervals = [twin.interval(a, b, "simpson") for a, b in pairwise(states)]

    parameters = out.parameters().set_index(["layer", "index"])["lc"]
    layers = out.layers().set_index(["start_step", "layer"])["lc"]
    scale = sum(interval.scale for interval in intervals)
    for name in twin.parameters:
        expected = sum(interval.lc[name] for interval in intervals)
        found = torch.from_numpy(parameters.loc[name].to_numpy(copy=True)).view(expected.shape)
        assert float((found - expected).abs().sum()) <= 1e-10 * scale, name
        for step, interval in enumerate(intervals):
            assert abs(layers[step, name] - interval.layer(name)) <= 1e-10 * interval.scale


@pytest.mark.parametrize(
    ("name", "steps", "samples"),
    [("mnist_fc", 12, 500), ("cifar_resnet20", 4, 40), ("char_gpt", 8, 24)],
)
def test_examples_verify_clean(
    name: str, steps: int, samples: int, data_folder: Path, tmp_path: Path
) -> None:
    options = ("--refine", "--max-panels", "4")
    record(name, tmp_path / "run", data_folder, steps=steps, samples=samples)
    out = analyze(name, tmp_path / "run", tmp_path / "out", data_folder, samples, *options)
    rows = out.intervals()
    assert len(rows) == steps * len(out.plan.splits) and (rows["status"] == "ok").all()
    converged = rows[rows["converged"]]
    # What counts as converged is within the tolerance, in float32: atol is 1e-6 of the first loss.
    first = {split.name: split.first_loss or 0.0 for split in out.plan.splits}
    bound = (1e-3 * converged["loss_change"].abs()).clip(
        lower=converged["split"].map(first).astype(float) * 1e-6
    )
    assert len(converged) and (converged["gap"].abs() <= bound * (1 + 1e-6)).all()


def test_moving_statistics_of_resnet_have_rows(data_folder: Path, tmp_path: Path) -> None:
    """BatchNorm's running statistics get LC of their own, without which it would not close."""
    record("cifar_resnet20", tmp_path / "run", data_folder, steps=3, samples=60)
    options = ("--split", "train", "--dtype", "float64")
    out = analyze("cifar_resnet20", tmp_path / "run", tmp_path / "out", data_folder, 60, *options)
    rows = out.layers().groupby("kind", observed=True)["lc"].sum()
    change = out.intervals()["loss_change"].sum()
    # The first steps throw the statistics far: one panel a step is coarse, and still far better
    # than leaving their part of the change out.
    assert abs(rows.sum() - change) < 0.5 * abs(rows["parameter"] - change)
