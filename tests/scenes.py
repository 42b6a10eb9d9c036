"""Small tasks and recorded runs for the tests that go through workers, and how to compare outputs.

The tasks stand at module level, so that workers import them by name as they would a user's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray.checkpoints import Recorder
from lcray.errors import LcrayError
from lcray.execution.cluster.actor import Shipment, Worker
from lcray.execution.cluster.resources import Resources, place_workers
from lcray.execution.driver.analyze import Progress
from lcray.execution.driver.job import Job
from lcray.execution.worker.descriptions import Description
from lcray.execution.worker.reports import Outcome, SpanReport, View
from lcray.execution.worker.workers import Workers
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_plan, make_settings
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.tables.output import Output
from lcray.tables.reading.results import Results, open_output
from lcray.tables.record import Record
from lcray.tables.reducing.reduce import Reduction, merge, reduce
from lcray.tasks.task import Task, TaskSource

Pair = tuple[Tensor, Tensor]
#: Those of the analysis `plain_out`.
OPTIONS: dict[str, Any] = {"span_length": 3, "elements": True}


def build_plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def build_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


class Tied(nn.Module):
    """Predicts the next token from the one before; the embedding is the output layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.embedding(tokens))))
        return logits


def points() -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    return {"train": (x[:17], y[:17]), "val": (x[17:], y[17:])}


def sentences() -> dict[str, tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {"train": (torch.randint(7, (9, 6), generator=generator),)}


def cross_entropy(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_token(model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """Losses and weights per token; token 0 is padding."""
    before, after = batch[0][:, :-1], batch[0][:, 1:].flatten()
    losses = F.cross_entropy(model(before).flatten(0, 1), after, reduction="none")
    return losses, (after != 0).float()


def classes(batch: Pair) -> Tensor:
    return batch[1]


plain = Task(build_plain, points, cross_entropy, groups=classes)
batchnorm = Task(build_batchnorm, points, cross_entropy, groups=classes)
tied = Task(Tied, sentences, next_token)


def needs_argument(size: int) -> Task:
    return plain


def reduced_loss(model: nn.Module, batch: Pair) -> Tensor:
    return cross_entropy(model, batch).mean()


def random_loss(model: nn.Module, batch: Pair) -> Tensor:
    return cross_entropy(model, batch) * torch.rand(())


reduced = Task(build_plain, points, reduced_loss)
noisy = Task(build_plain, points, random_loss)
empty = Task(build_plain, {"train": (torch.empty(0, 4), torch.empty(0))}, cross_entropy)


def held_loss(folder: str, model: nn.Module, batch: Pair) -> Tensor:
    """Takes hold of ``folder/hold`` if it is there, says who it is, and waits to be killed."""
    try:
        os.rename(f"{folder}/hold", f"{folder}/held-{os.getpid()}")
    except FileNotFoundError:
        return cross_entropy(model, batch)
    time.sleep(60)
    raise RuntimeError("nobody killed this worker")


def deadly_loss(folder: str, model: nn.Module, batch: Pair) -> Tensor:
    """Kills its worker while ``folder/kill`` is there."""
    if os.path.exists(f"{folder}/kill"):
        die(folder)
    return cross_entropy(model, batch)


def paced_loss(folder: str, model: nn.Module, batch: Pair) -> Tensor:
    """Takes its time while ``folder/slow`` is there, and says who is at work in ``folder/at-…``.

    If that file names another, both begin as soon as that one exists: ``analysis.json`` is there
    once the first span may begin. Takes hold of ``folder/hold`` if it is there, as `held_loss`, but
    gives up on nobody.
    """
    slow = Path(folder, "slow")
    after = ""
    with suppress(FileNotFoundError):
        after = slow.read_text()
    if after and not os.path.exists(after):
        return cross_entropy(model, batch)
    Path(folder, f"at-{os.getpid()}").touch()
    if os.path.exists(f"{folder}/hold"):
        with suppress(FileNotFoundError):
            os.rename(f"{folder}/hold", f"{folder}/held-{os.getpid()}")
            time.sleep(600)
    if slow.exists():
        time.sleep(0.3)
    if os.path.exists(f"{folder}/eat-{os.getpid()}"):
        eaten.append(torch.ones(1 << 28))  # a gigabyte
    return cross_entropy(model, batch)


eaten: list[Tensor] = []


def failing_loss(folder: str, model: nn.Module, batch: Pair) -> Tensor:
    """Raises an error while ``folder/fail`` is there, and adds a line to ``folder/failures``."""
    if os.path.exists(f"{folder}/fail"):
        with open(f"{folder}/failures", "a") as file:
            print(os.getpid(), file=file)
        raise ValueError("no such class")
    return cross_entropy(model, batch)


def slow_loss(seconds: float, model: nn.Module, batch: Pair) -> Tensor:
    time.sleep(seconds)
    return cross_entropy(model, batch)


def deadly_model(folder: str, driver: int) -> nn.Module:
    """Kills the process that builds it, unless that is the driver."""
    if os.getpid() != driver:
        die(folder)
    return build_plain()


def die(folder: str) -> None:
    """Kills this process and adds a line to ``folder/deaths``; ten times, so that nothing hangs."""
    with open(f"{folder}/deaths", "a") as file:
        print(os.getpid(), file=file)
    with open(f"{folder}/deaths") as file:
        if len(file.readlines()) <= 10:
            os.kill(os.getpid(), signal.SIGKILL)


def with_loss(loss: Callable[..., Any], *arguments: Any) -> Task:
    """The plain task with a loss of its own."""
    return Task(build_plain, points, partial(loss, *arguments), groups=classes)


def record(
    task: Task,
    run: Path,
    *,
    steps: int = 12,
    seed: int = 1,
    start: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Train a task's network by SGD with momentum on its first split; a checkpoint a step.

    With `start`, go on from the checkpoint of that step (momentum begins anew).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model()
    if start is not None:
        from lcray.checkpoints import open_series

        state = open_series(run, minimum=1).read(start)
        model.load_state_dict(state.tensors, strict=False)
    data = next(iter(task.splits().values() if callable(task.splits) else task.splits.values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    model.to(dtype)
    data = tuple(part.to(dtype) if part.is_floating_point() else part for part in data)
    with Recorder(model, run, start=start) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            found = task.loss(model, data)
            (found[0] * found[1] if isinstance(found, tuple) else found).mean().backward()
            optimizer.step()
            recorder.step()
    return run


def by_one_worker(task: Task, run: Path, out: Path, length: int, **options: Any) -> Results:
    """Every span by one worker of this process, the last one first, then the tables."""
    work = Workspace(task, str(run), make_settings(options))
    splits, layers = work.probe().splits, work.flat.layers
    plan = make_plan(work.series.steps, work.settings, layers, splits, span_length=length)
    for span in reversed(plan.spans):
        assert work.run(plan, span, out, "a").committed
    Output(out).write(Record(str(run), "m:t", plan, {"device": plan.device_kind}, {"python": "3"}))
    reduce(out)
    return open_output(out)


def checkpoint(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}.safetensors"


def tables(out: Path) -> dict[str, bytes]:
    """Every file of ``OUT/tables``, bit for bit."""
    return {path.name: path.read_bytes() for path in sorted((out / "tables").iterdir())}


def commits(out: Path) -> dict[str, tuple[int, int, bytes]]:
    """Time, inode and contents of every committed file, by its path in the output."""
    folders = [path.parent for path in out.glob("shards/*/commit.json")]
    files = [path for folder in folders for path in folder.iterdir()]
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in sorted(files)
    }


def spans_of(out: Path) -> list[str]:
    """The names of the committed spans."""
    return sorted(path.parent.name for path in out.glob("shards/*/commit.json"))


class InlinePool(Workers):
    """As `lcray.execution.cluster.pool.Pool`, of one worker in this process, without Ray."""

    size = 2

    def __init__(
        self,
        source: TaskSource,
        run: str,
        settings: Settings,
        resources: Resources,
        *,
        steps: str | None,
        threads: int,
        limit: int,
        partial_sums: int = 1,
    ) -> None:
        self._worker = Worker()
        placement = place_workers(resources, [{"CPU": 2.0}], limit)
        self._setup = (
            *(Shipment.pack(source), run, settings, steps, threads),
            *(partial_sums, placement),
        )
        self._description: Description | None = None

    def __exit__(self, *_: object) -> None:
        pass

    def describe(self) -> Description:
        if self._description is None:
            self._description = self._worker.set_up(*self._setup)
        return self._description

    def ask(self, method: str, *arguments: Any) -> Any:
        self.describe()
        return self._worker.ask(method, *arguments)

    def run(
        self,
        plan: Plan,
        spans: Sequence[Span],
        out: Path,
        on_done: Callable[[Span, SpanReport], None],
        on_tick: Callable[[View], None] = lambda view: None,
    ) -> Outcome:
        outcome = Outcome()
        for number, span in enumerate(spans):
            try:
                report = self._worker.run_span(plan, span, str(out), f"inline-{number}")
            except LcrayError as error:
                outcome.failures[span] = str(error)
            else:
                outcome.reports[span] = report
                on_done(span, report)
        return outcome

    def reduce(self, out: Path) -> Reduction:
        return merge(Output(out))


def work_inline(patch: pytest.MonkeyPatch) -> None:
    """Analyses take place in this process, without Ray."""

    def workers(job: Job, tell: Any = None, *_: Any) -> InlinePool:
        if tell is not None:
            tell(Progress("start"))
        pool: Any = job.pool(InlinePool)
        return pool

    patch.setattr("lcray.execution.driver.analyze.workers", workers)
    patch.setattr("ray.get_gpu_ids", list)


class Told:
    """Keeps what was told of the progress, and does something when `done` intervals are reached."""

    def __init__(self, done: int = -1, then: Callable[[], Any] = lambda: None) -> None:
        self.states: list[Progress] = []
        self._done, self._then = done, then

    def __call__(self, progress: Progress) -> None:
        self.states.append(progress)
        if progress.phase == "spans" and progress.done >= self._done >= 0:
            self._done = -1
            self._then()

    @property
    def counts(self) -> list[int]:
        """Of the committed intervals, as they went up."""
        return [state.done for state in self.states if state.phase == "spans"]


def sources(folder: Path) -> dict[str, str]:
    """The text of the Python files of a folder, by name."""
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def python_environment() -> dict[str, str]:
    """For child processes: this Python first, no colours, no Ray of the parent's."""
    left_out = ("RAY_ADDRESS", "COLUMNS", "FORCE_COLOR", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    folder = str(Path(sys.executable).parent)
    return kept | {"PATH": f"{folder}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}
