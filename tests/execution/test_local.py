"""Analyses in this process, without Ray: the same commits and tables, and nothing left behind."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from console import Lcray
from repository import TESTS
from torch import Tensor, nn

import lcray
from lcray.errors import CheckpointError, ClusterError, IncompleteError, TaskError, UsageError
from lcray.execution import local
from lcray.execution.cluster.resources import Resources
from lcray.execution.cluster.scheduler import Policy
from lcray.execution.driver.progress import Progress
from lcray.planning.saved import load_plan
from lcray.tasks.model.precision import precision_kept

LOCAL, RAY = Resources(local=True), Resources(workers=2, local=False)
OPTIONS = scenes.OPTIONS


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that this process is connected to decides, and starting a Ray fails at once."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", "/too-long" * 20)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def start(code: str, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """A Python of its own, which finds the tests' tasks."""
    environment = scenes.python_environment() | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, input=text, capture_output=True, text=True)


def test_tables_and_commits_are_complete_and_equal_those_of_another_pool(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    results = lcray.analyze(plain_run, "scenes:plain", tmp_path, resources=LOCAL, **OPTIONS)
    assert lcray.verify(tmp_path).ok
    assert results.plan.spans == lcray.open(plain_out).plan.spans
    assert scenes.tables(tmp_path) == scenes.tables(plain_out)
    found = lcray.status(tmp_path)
    assert (found.state, found.intervals_done, found.intervals) == ("finished", 12, 12)


@pytest.mark.ray
def test_ray_makes_the_same_tables_and_either_resumes_the_other(
    ray_cluster: None, plain_run: Path, tmp_path: Path
) -> None:
    """All four ways: here, on Ray, begun here and ended on Ray, begun on Ray and ended here."""
    saved = tmp_path / "plan.json"
    lcray.plan(plain_run, "scenes:plain", resources=LOCAL, **OPTIONS).save(saved)
    ways = {"here": (LOCAL,), "ray": (RAY,), "to ray": (LOCAL, RAY), "to here": (RAY, LOCAL)}
    tables = {}
    for name, (*first, last) in ways.items():
        out = tmp_path / name
        kept: dict[str, Any] = {}
        for resources in first:
            told = scenes.Told(6, then=interrupt)
            with pytest.raises(KeyboardInterrupt):
                lcray.analyze(
                    plain_run, "scenes:plain", out, plan=load_plan(saved), resources=resources,
                    on_progress=told,
                )  # fmt: skip
            kept = scenes.commits(out)
            assert 2 <= len(scenes.spans_of(out)) < 4
        lcray.analyze(plain_run, "scenes:plain", out, plan=load_plan(saved), resources=last)
        assert kept.items() <= scenes.commits(out).items(), "what was committed is not redone"
        tables[name] = scenes.tables(out)
        assert lcray.verify(out).ok
    assert len(tables["here"]) > 5
    assert tables["ray"] == tables["to ray"] == tables["to here"] == tables["here"]


def interrupt() -> None:
    raise KeyboardInterrupt


def stopping_loss(folder: str, model: nn.Module, batch: scenes.Pair) -> Tensor:
    """Says who computes it, and sends SIGINT while ``folder/stop`` is there."""
    with open(f"{folder}/who", "a") as file:
        main = threading.current_thread() is threading.main_thread()
        print(os.getpid(), main, file=file)
    if os.path.exists(f"{folder}/stop"):
        os.unlink(f"{folder}/stop")
        signal.raise_signal(signal.SIGINT)
    return scenes.cross_entropy(model, batch)


def test_an_interrupt_in_the_task_loses_no_commit_and_resumes(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    task, out = scenes.with_loss(stopping_loss, str(tmp_path)), tmp_path / "out"
    told = scenes.Told(6, then=(tmp_path / "stop").touch)
    with pytest.raises(KeyboardInterrupt):
        lcray.analyze(plain_run, task, out, resources=LOCAL, on_progress=told, **OPTIONS)
    kept = scenes.commits(out)
    assert len(scenes.spans_of(out)) == 2
    assert lcray.status(out).state == "interrupted"
    assert not list(out.glob("tables/*.parquet"))
    lcray.analyze(plain_run, task, out, resources=LOCAL, **OPTIONS)
    assert kept.items() <= scenes.commits(out).items()
    assert scenes.tables(out) == scenes.tables(plain_out)
    # A breakpoint in the task stops where it stands.
    assert set((tmp_path / "who").read_text().splitlines()) == {f"{os.getpid()} True"}


def test_a_debugger_in_the_task(plain_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import scenes\n"
        "stops = iter([breakpoint])\n"
        "def loss(model, batch):\n"
        "    answer = 42\n"
        "    next(stops, int)()\n"
        "    return scenes.cross_entropy(model, batch)\n"
        "task = scenes.Task(scenes.build_plain, scenes.points, loss)\n"
    )
    code = "import sys; from lcray.cli.app import main; sys.argv[0] = 'lcray'; main()"
    options = ("--task", tmp_path / "mine.py:task", "--out", tmp_path / "out", "--local")
    done = start(code, "analyze", plain_run, *options, text="p 'answer', answer\nc\n")
    assert done.returncode == 0, done.stderr
    assert "('answer', 42)" in done.stdout + done.stderr
    assert lcray.verify(tmp_path / "out").ok


def test_in_a_notebook_whose_event_loop_runs(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    async def cell() -> None:
        asyncio.get_running_loop()
        lcray.analyze(plain_run, scenes.plain, tmp_path, resources=LOCAL, **OPTIONS)

    asyncio.run(cell())
    assert scenes.tables(tmp_path) == scenes.tables(plain_out)


TASK = "\n".join(
    [
        "import torch, torch.nn.functional as F",
        "from torch import nn, Tensor",
        "from lcray import Task",
        "Pair = tuple[Tensor, Tensor]",
        *map(inspect.getsource, (scenes.build_plain, scenes.points, scenes.cross_entropy)),
        inspect.getsource(scenes.classes),
        "task = Task(build_plain, points, cross_entropy, groups=classes)",
    ]
)
WITHOUT_RAY = """
import sys
import lcray
run, task, out = sys.argv[1:]
options = {"span_length": 3, "elements": True}
report = lcray.plan(run, task, **options)
assert report.local and report.workers == 1
told = []
lcray.analyze(run, task, out, on_progress=told.append, **options)
assert [state.phase for state in told][0] == "local"
lcray.trace(run, task, out)
print(*{"ray", "torch"} & {*sys.modules})
"""


def test_ray_is_never_imported_even_where_this_is_chosen_by_itself(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    done = start(WITHOUT_RAY, plain_run, tmp_path / "mine.py:task", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch"]
    assert scenes.tables(tmp_path / "out") == scenes.tables(plain_out)


class TestTheProcess:
    """It is as before, also where the task has changed it, and where the analysis has failed."""

    @pytest.fixture(autouse=True)
    def unusual(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        """A process with settings that are not the defaults, put back after the test."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OF_MINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        torch.manual_seed(7)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        with precision_kept():
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            yield
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)

    def state(self) -> dict[str, Any]:
        return {
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "deterministic": torch.get_deterministic_debug_mode(),
            "precision": torch.backends.mkldnn.matmul.fp32_precision,
            "benchmark": torch.backends.cudnn.benchmark,
            "anomalies": torch.is_anomaly_enabled(),
            "gradients": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(np.random.get_state()),
            "random": random.getstate(),
            "environment": dict(os.environ),
            "path": list(sys.path),
            "folder": os.getcwd(),
            "filters": list(warnings.filters),
            "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        }

    def model(self) -> nn.Module:
        """Changes everything that it can reach."""
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(False)
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        torch.manual_seed(99)
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        np.random.seed(1)
        random.seed(1)
        os.environ["OF_MINE"] = "2"
        os.environ["ANOTHER"] = "3"
        sys.path.append("/nowhere")
        os.chdir("/")
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return scenes.build_plain()

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_after_success(self, plain_run: Path, tmp_path: Path) -> None:
        task, before = replace(scenes.plain, model=self.model), self.state()
        lcray.analyze(plain_run, task, tmp_path / "out", resources=LOCAL, **OPTIONS)
        assert self.state() == before
        assert lcray.verify(tmp_path / "out").ok

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_after_failure(self, plain_run: Path, tmp_path: Path) -> None:
        (tmp_path / "fail").touch()
        failing = scenes.with_loss(scenes.failing_loss, str(tmp_path))
        task, before = replace(failing, model=self.model), self.state()
        with pytest.raises(TaskError, match="no such class") as raised:
            lcray.analyze(plain_run, task, tmp_path / "out", resources=LOCAL)
        assert isinstance(raised.value.__cause__, ValueError), "for a post-mortem debugger"
        assert self.state() == before

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, "autocast"])
    def test_modes_of_the_caller_do_not_come_in(
        self, mode: Any, plain_run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        entered = torch.autocast("cpu") if mode == "autocast" else mode()
        with entered:
            before = self.state()
            lcray.analyze(plain_run, scenes.plain, tmp_path / "out", resources=LOCAL, **OPTIONS)
            assert self.state() == before
        assert scenes.tables(tmp_path / "out") == scenes.tables(plain_out)

    def test_defaults_of_the_caller_do_not_come_in(
        self, plain_run: Path, plain_out: Path, tmp_path: Path
    ) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                before = str(torch.get_default_device()), torch.get_default_dtype()
                lcray.analyze(plain_run, scenes.plain, tmp_path / "out", resources=LOCAL, **OPTIONS)
                assert before == (str(torch.get_default_device()), torch.get_default_dtype())
        finally:
            torch.set_default_dtype(torch.float32)
        assert scenes.tables(tmp_path / "out") == scenes.tables(plain_out)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_a_task_that_goes_elsewhere_takes_no_output_along(
        self, plain_run: Path, tmp_path: Path
    ) -> None:
        task = replace(scenes.plain, model=self.model)
        lcray.analyze(plain_run, task, "relative", resources=LOCAL, **OPTIONS)
        assert lcray.verify(tmp_path / "relative").ok

    def test_analyses_in_several_threads_take_turns(self, plain_run: Path, tmp_path: Path) -> None:
        task, before = replace(scenes.plain, model=disturbing_model), self.state()
        outs = [tmp_path / str(number) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda out: lcray.analyze(plain_run, task, out, resources=LOCAL), outs))
        assert self.state() == before
        assert len({str(scenes.tables(out)) for out in outs}) == 1


def disturbing_model() -> nn.Module:
    """Changes, while it is built, what an analysis in another thread would find and put back."""
    os.environ[f"OF_{threading.get_ident()}"] = "1"
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    time.sleep(0.2)
    return scenes.build_plain()


class TestFailures:
    def test_a_task_that_fails_is_not_tried_again(self, plain_run: Path, tmp_path: Path) -> None:
        task, out = scenes.with_loss(scenes.failing_loss, str(tmp_path)), tmp_path / "out"
        told = scenes.Told(6, then=(tmp_path / "fail").touch)
        with pytest.raises(IncompleteError, match="6 intervals are missing") as raised:
            lcray.analyze(plain_run, task, out, resources=LOCAL, on_progress=told, **OPTIONS)
        assert isinstance(raised.value.__cause__, TaskError)
        assert len((tmp_path / "failures").read_text().splitlines()) == 2, "one try for each span"
        assert len(scenes.spans_of(out)) == 2
        assert [failed.first for failed in lcray.status(out).failed] == [6, 9]

    def test_a_file_that_cannot_be_read_is_tried_again_after_the_others(
        self, run: Path, plain_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad, out = scenes.checkpoint(run, 4), tmp_path / "out"
        whole, stamp = bad.read_bytes(), bad.stat()
        monkeypatch.setattr(local, "_POLICY", Policy(backoff=0.01))

        def tell(progress: Progress) -> None:
            if progress.phase == "spans" and progress.done == 0:
                bad.write_bytes(whole[:-1])
            elif progress.done == 9:
                bad.write_bytes(whole)
                os.utime(bad, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

        lcray.analyze(run, "scenes:plain", out, resources=LOCAL, on_progress=tell, **OPTIONS)
        assert scenes.tables(out) == scenes.tables(plain_out)

    def test_a_file_that_can_never_be_read_is_given_up(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad, out = scenes.checkpoint(run, 4), tmp_path / "out"
        monkeypatch.setattr(local, "_POLICY", Policy(backoff=0.01))
        told = scenes.Told(0, then=lambda: bad.write_bytes(b""))
        with pytest.raises(
            IncompleteError, match=r"3 intervals are missing \(steps 3-6\)"
        ) as raised:
            lcray.analyze(run, "scenes:plain", out, resources=LOCAL, on_progress=told, **OPTIONS)
        assert isinstance(raised.value.__cause__, CheckpointError)
        assert len(scenes.spans_of(out)) == 3


def test_progress_within_a_span_goes_into_the_status(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_SECONDS_A_TICK", 0.0)
    told = scenes.Told()
    lcray.analyze(plain_run, scenes.plain, tmp_path, resources=LOCAL, on_progress=told, **OPTIONS)
    running = [state.running for state in told.states if state.phase == "spans"]
    assert {1.0, 2.0} <= set(running)
    assert all(a <= b for a, b in zip(told.counts, told.counts[1:], strict=False))


@pytest.mark.parametrize(
    "option",
    [
        {"workers": 2}, {"data_parallel": 2}, {"address": "127.0.0.1:6379"}, {"address": "local"},
        {"cpus_per_worker": 2.0}, {"custom": {"slot": 1.0}}, {"patience": 5.0},
    ],
)  # fmt: skip
def test_what_takes_ray_is_refused(option: dict[str, Any], plain_run: Path, tmp_path: Path) -> None:
    name = next(iter(option))
    flag = "resource" if name == "custom" else name.replace("_", "-")
    with pytest.raises(UsageError, match=f"leave out --{flag}, or --local"):
        lcray.analyze(
            plain_run, "scenes:plain", tmp_path / "out", resources=Resources(local=True, **option)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("threads", [0, -1])
def test_threads_that_no_process_has(
    local: bool, threads: int, plain_run: Path, tmp_path: Path
) -> None:
    resources = Resources(local=local, threads=threads)
    with pytest.raises(UsageError, match=f"threads {threads}: must be at least 1"):
        lcray.analyze(plain_run, "scenes:plain", tmp_path / "out", resources=resources)


def test_what_a_process_has_is_not_refused(plain_run: Path) -> None:
    resources = Resources(local=True, workers=1, memory=1.0, threads=1, gpus_per_worker=0)
    assert lcray.plan(plain_run, "scenes:plain", resources=resources).local


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(plain_run: Path) -> None:
    with pytest.raises(UsageError, match="gpus-per-worker 1: there is no GPU here"):
        lcray.plan(plain_run, "scenes:plain", resources=Resources(local=True, gpus_per_worker=1))


@pytest.mark.usefixtures("no_ray")
class TestTheChoice:
    def test_a_small_job_is_done_here_and_said_so(
        self, command: Lcray, plain_run: Path, tmp_path: Path
    ) -> None:
        options = ("--task", "scenes:plain", "--out", tmp_path, "--json")
        found = command("analyze", plain_run, *options)
        assert found.code == 0, found.err
        said = [line for line in found.err.splitlines() if "in this process" in line]
        assert len(said) == 1
        assert "all gradients take about" in said[0]
        assert "starting workers about 10 s (--no-local starts them)" in said[0]
        assert found.out.startswith("{"), "JSON alone"
        done = command("analyze", plain_run, *options)
        assert "lcray: working in this process\n" in done.err, "there is nothing left to take time"
        again = command("analyze", plain_run, *options, "--local")
        assert "lcray: working in this process\n" in again.err

    def test_the_plan_says_so(self, command: Lcray, plain_run: Path) -> None:
        found = command("plan", plain_run, "--task", "scenes:plain")
        assert "of gradients in one process, without starting workers" in found.out

    @pytest.mark.parametrize(
        "resources",
        [
            Resources(local=False), Resources(workers=1), Resources(data_parallel=2),
            Resources(gpus_per_worker=0.5), Resources(custom={"slot": 1.0}),
            Resources(address="local"), Resources(patience=9.0), Resources(cpus_per_worker=0.5),
        ],
    )  # fmt: skip
    def test_an_option_of_ray_decides(self, resources: Resources, plain_run: Path) -> None:
        with pytest.raises(ClusterError, match="RAY_TMPDIR"):
            lcray.plan(plain_run, "scenes:plain", resources=resources, partial_sums=2)

    def test_the_address_in_the_environment_decides(
        self, plain_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
        with pytest.raises(UsageError, match=r"RAY_ADDRESS.*is a dashboard's address"):
            lcray.plan(plain_run, "scenes:plain")
        assert lcray.plan(plain_run, "scenes:plain", resources=LOCAL).local

    def test_a_ray_that_is_connected_decides(
        self, plain_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        monkeypatch.setattr("ray.is_initialized", lambda: not asked.append(1))
        monkeypatch.setattr("ray.nodes", list)  # as of a cluster that has none
        with pytest.raises(UsageError, match="no node has"):
            lcray.plan(plain_run, "scenes:plain")
        assert asked

    def test_gradients_that_take_long_decide(self, plain_run: Path, tmp_path: Path) -> None:
        task = scenes.with_loss(scenes.slow_loss, 0.0)
        report = lcray.plan(plain_run, task, **OPTIONS)
        assert report.local
        long = replace(report.plan, seconds=1.0)  # 12 s in all
        with pytest.raises(ClusterError, match="RAY_TMPDIR"):
            lcray.analyze(plain_run, task, tmp_path / "a", plan=long)
        short = replace(report.plan, seconds=0.5)
        lcray.analyze(plain_run, task, tmp_path / "b", plan=short)
        assert lcray.verify(tmp_path / "b").ok

    def test_what_is_committed_does_not_count(self, plain_run: Path, tmp_path: Path) -> None:
        report = lcray.plan(plain_run, "scenes:plain", **OPTIONS)
        long, told = replace(report.plan, seconds=1.0), scenes.Told(6, then=interrupt)
        with pytest.raises(KeyboardInterrupt):
            lcray.analyze(
                plain_run, "scenes:plain", tmp_path, plan=long, resources=LOCAL, on_progress=told
            )
        states: list[Progress] = []
        lcray.analyze(plain_run, "scenes:plain", tmp_path, plan=long, on_progress=states.append)
        assert states[0].phase == "local"
        assert states[0].seconds_left == 6.0

    def test_a_measurement_decides_without_a_plan(self, plain_run: Path) -> None:
        """A loss that burns processor time: 12 intervals of 2 gradients of 2 splits, 0.3 s each."""
        with pytest.raises(ClusterError, match="RAY_TMPDIR"):
            lcray.plan(plain_run, scenes.with_loss(burning_loss, 0.3), **OPTIONS)


def burning_loss(seconds: float, model: nn.Module, batch: scenes.Pair) -> Tensor:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return scenes.cross_entropy(model, batch)
