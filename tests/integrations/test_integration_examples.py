"""The examples of docs/integrations.md, as they stand there, run; and what they record closes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scenes
import torch
from repository import DOCS, PACKAGE, ROOT
from test_ranks import launch

import lcray
from lcray.checkpoints import open_series
from lcray.tasks.task import load_task

EXAMPLES = ROOT / "examples" / "integrations"
PAGE = (DOCS / "integrations.md").read_text()
BLOCKS = re.findall(r"```python\n# examples/integrations/(\w+\.py)\n(.*?)```", PAGE, re.DOTALL)


def test_the_docs_hold_the_examples() -> None:
    assert sorted(name for name, _ in BLOCKS) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    for name, text in BLOCKS:
        assert text == (EXAMPLES / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hugging_face", "with_lightning", "with_accelerate"])
def test_an_example_records_a_run_that_closes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path, env={**os.environ, **path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    series = open_series(tmp_path / "trained" / "run")
    assert series.steps == (0, 1, 2, 3, 4)
    if name == "with_accelerate":
        return
    monkeypatch.chdir(tmp_path)
    try:
        task = load_task(f"{EXAMPLES / name}.py:task")
    finally:
        sys.modules.pop(name, None)
    runs = [tmp_path / "trained" / "run"]
    runs += [tmp_path / "trained" / "hf"] if name == "hugging_face" else []
    for run in runs:
        series = open_series(run)
        assert series.steps == (0, 1, 2, 3, 4)
        states = (series.read(2).tensors, series.read(3).tensors)
        for split in lcray.allocate(task, *states).values():
            assert abs(split.gap) < 1e-3 * abs(split.loss_change)
    if name == "hugging_face":  # by the task's name, as on the command line
        scenes.work_inline(monkeypatch)
        lcray.analyze(runs[0], f"{EXAMPLES / name}.py:task", "out", refine=True)
        intervals = lcray.open("out").intervals()
        assert len(intervals) == 8 and intervals["converged"].all()
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--shard"]])
def test_the_distributed_example(tmp_path: Path, option: list[str]) -> None:
    launch(EXAMPLES / "distributed.py", *option, cwd=tmp_path)
    assert open_series(tmp_path / "trained" / "run").steps == (0, 1, 2, 3, 4)


@pytest.mark.slow
def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    launch(EXAMPLES / "with_accelerate.py", cwd=tmp_path)
    assert open_series(tmp_path / "trained" / "run").steps == (0, 1, 2)  # half as many each


@pytest.mark.slow
def test_a_trainer_on_two_processes(tmp_path: Path) -> None:
    launch(EXAMPLES / "hugging_face.py", cwd=tmp_path)
    ours, own = (open_series(tmp_path / "trained" / name) for name in ("run", "hf"))
    assert ours.steps == own.steps == (0, 1, 2, 3, 4)
    for step in ours.steps:
        recorded, saved = ours.read(step).tensors, own.read(step).tensors
        assert recorded.keys() == saved.keys()
        assert all(torch.equal(recorded[name], saved[name]) for name in saved)
