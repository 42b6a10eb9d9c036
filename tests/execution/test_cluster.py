"""Workers on a real Ray: order, death, set-up; and what Ray an analysis works on."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import scenes
import torch

import lcray
from lcray.errors import (
    ClusterError,
    IncompleteError,
    TaskError,
    UsageError,
)
from lcray.execution.cluster import actor, dispatch
from lcray.execution.cluster.actor import Shipment
from lcray.execution.cluster.connect import connection
from lcray.execution.cluster.pool import Pool
from lcray.execution.cluster.resources import Resources, place_workers
from lcray.execution.cluster.scheduler import Policy
from lcray.execution.cluster.supervision import SupervisedPool
from lcray.execution.worker.reports import Outcome, SpanReport
from lcray.planning.plan import Plan, Span
from lcray.settings import Settings
from lcray.tasks.task import Task, TaskSource, locate

pytestmark = pytest.mark.ray

SETTINGS = Settings()
ATTEMPTS = Policy().attempts


def analyze(run: Path, task: Task | str, out: Path, workers: int, **options: Any) -> lcray.Results:
    resources = Resources(workers=workers)
    return lcray.analyze(run, task, out, resources=resources, **options)


def shuffle_spans(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[list[Span]]:
    """Pools hand the spans out in a random order; gives the orders that were used."""
    original, orders = Pool.run, []

    def shuffled(self: Pool, plan: Plan, spans: Sequence[Span], *more: Any) -> Outcome:
        orders.append(random.Random(seed).sample(list(spans), len(spans)))
        return original(self, plan, orders[-1], *more)

    monkeypatch.setattr(Pool, "run", shuffled)
    return orders


NETS = [
    pytest.param("batchnorm", "batch", id="batchnorm by batch", marks=pytest.mark.slow),
    pytest.param("batchnorm", "running", id="batchnorm running", marks=pytest.mark.slow),
    pytest.param("tied", "running", id="tied", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("net", "mode"), NETS)
@pytest.mark.usefixtures("ray_cluster")
def test_workers_and_order_do_not_change_a_bit(
    net: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = f"scenes:{net}"
    run = scenes.record(getattr(scenes, net), tmp_path / "run", steps=8)
    options: dict[str, Any] = {"batch_norm": mode, "batch_size": 5, "elements": True}
    one = analyze(run, task, tmp_path / "one", 1, span_length=1, **options)
    orders = shuffle_spans(monkeypatch, seed=3)
    analyze(run, task, tmp_path / "many", 3, plan=one.plan)
    assert sorted(orders[0], key=lambda span: span.first) == list(one.plan.spans) != orders[0]
    assert len(one.plan.spans) == 8
    assert scenes.tables(tmp_path / "many") == scenes.tables(tmp_path / "one")
    assert lcray.verify(tmp_path / "many").ok


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_killed_in_the_middle_of_a_span_is_replaced(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    task = scenes.with_loss(scenes.held_loss, str(tmp_path))
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 45
        while not killed and time.monotonic() < deadline:
            for path in tmp_path.glob("held-*"):
                killed.append(int(path.name.removeprefix("held-")))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    told = scenes.Told(done=3, then=lambda: (tmp_path / "hold").touch())
    thread.start()
    analyze(plain_run, task, tmp_path / "out", 2, span_length=3, elements=True, on_progress=told)
    thread.join()
    assert len(killed) == 1
    assert scenes.tables(tmp_path / "out") == scenes.tables(plain_out)
    # The span that lost its worker was tried a second time.
    tries = [path.stem.split("-")[1] for path in tmp_path.glob("out/shards/*/layers-*.parquet")]
    assert sorted(tries) == ["1", "1", "1", "2"]
    assert [*dict.fromkeys(told.counts)] == [0, 3, 6, 9, 12]  # also told how far spans are


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_span_that_kills_its_workers_is_given_up_and_can_be_resumed(
    plain_run: Path, plain_out: Path, tmp_path: Path
) -> None:
    task = scenes.with_loss(scenes.deadly_loss, str(tmp_path))
    out, kill = tmp_path / "out", tmp_path / "kill"
    told = scenes.Told(done=9, then=kill.touch)
    options: dict[str, Any] = {"span_length": 3, "elements": True}
    with pytest.raises(IncompleteError) as caught:
        analyze(plain_run, task, out, 1, on_progress=told, **options)
    assert "3 intervals are missing (steps 9-12): 9-12: its worker died" in str(caught.value)
    assert "\n" not in str(caught.value)
    pids = (tmp_path / "deaths").read_text().split()
    assert len(set(pids)) == len(pids) == ATTEMPTS
    kept = scenes.commits(out)
    assert scenes.spans_of(out) == ["00000000-00000003", "00000003-00000006", "00000006-00000009"]
    kill.unlink()
    analyze(plain_run, task, out, 1, **options)
    assert kept.items() <= scenes.commits(out).items()
    assert scenes.tables(out) == scenes.tables(plain_out)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_die_while_they_set_up_end_the_analysis(
    plain_run: Path, tmp_path: Path
) -> None:
    model = partial(scenes.deadly_model, str(tmp_path), os.getpid())
    task = Task(model, scenes.points, scenes.cross_entropy)
    with pytest.raises(ClusterError, match=r"keep dying while they set up.*memory"):
        analyze(plain_run, task, tmp_path / "out", 1)
    pids = (tmp_path / "deaths").read_text().split()
    assert ATTEMPTS < len(pids) <= ATTEMPTS + 1
    assert not (tmp_path / "out" / "analysis.json").exists()


def model_that_dies_once(folder: str, driver: int, deaths: int) -> torch.nn.Module:
    """Kills the worker that builds it after so many others have died, once."""
    marker, lines = Path(folder, "died-in-set-up"), Path(folder, "deaths")
    died = len(lines.read_text().split()) if lines.exists() else 0
    if os.getpid() != driver and died == deaths and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return scenes.build_plain()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_set_up_that_dies_once_after_poisonous_spans_ends_nothing(
    plain_run: Path, tmp_path: Path
) -> None:
    """Deaths in spans do not count against setting up: two spans cost six workers here."""
    model = partial(model_that_dies_once, str(tmp_path), os.getpid(), 5)
    loss = partial(scenes.deadly_loss, str(tmp_path))
    task = Task(model, scenes.points, loss, groups=scenes.classes)
    told = scenes.Told(done=6, then=(tmp_path / "kill").touch)
    with pytest.raises(IncompleteError, match="6 intervals are missing"):
        analyze(plain_run, task, tmp_path / "out", 1, span_length=3, on_progress=told)
    assert (tmp_path / "died-in-set-up").exists()
    assert len((tmp_path / "deaths").read_text().split()) == 2 * ATTEMPTS


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_a_worker_that_dies_while_it_probes_is_an_error(plain_run: Path, tmp_path: Path) -> None:
    (tmp_path / "kill").touch()
    task = scenes.with_loss(scenes.deadly_loss, str(tmp_path))
    with pytest.raises(ClusterError, match="died while checking the model"):
        lcray.plan(plain_run, task, resources=Resources(workers=1))


def counting_splits(folder: str) -> dict[str, scenes.Pair]:
    """Other data in every process that asks."""
    number = len(list(Path(folder).glob("asked-*")))
    Path(folder, f"asked-{number}-{os.getpid()}").touch()
    x, y = scenes.points()["train"]
    return {"train": (x + number, y)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_find_other_data_are_refused(plain_run: Path, tmp_path: Path) -> None:
    splits = partial(counting_splits, str(tmp_path))
    task = Task(scenes.build_plain, splits, partial(scenes.slow_loss, 0.2))
    with pytest.raises(TaskError, match="workers differ in model, data or device"):
        analyze(plain_run, task, tmp_path / "out", 2, span_length=1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_replacement_that_finds_other_data_is_refused(plain_run: Path, tmp_path: Path) -> None:
    splits = partial(counting_splits, str(tmp_path))
    loss = partial(scenes.deadly_loss, str(tmp_path))
    task = Task(scenes.build_plain, splits, loss)
    told = scenes.Told(done=6, then=(tmp_path / "kill").touch)
    with pytest.raises(TaskError, match="workers differ in model, data or device"):
        analyze(plain_run, task, tmp_path / "out", 1, span_length=3, on_progress=told)
    assert len((tmp_path / "deaths").read_text().split()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_errors_of_a_worker_arrive_as_they_are(plain_run: Path, tmp_path: Path) -> None:
    before = {actor["actor_id"] for actor in alive_actors()}
    with pytest.raises(TaskError, match=r"losses.*\[17\]|one loss per|reduction"):
        analyze(plain_run, "scenes:reduced", tmp_path / "out", 1)
    with pytest.raises(TaskError, match="split 'train': is empty"):
        lcray.plan(plain_run, "scenes:empty", resources=Resources(workers=1))
    deadline = time.monotonic() + 20
    while {actor["actor_id"] for actor in alive_actors()} - before:
        assert time.monotonic() < deadline, "workers were left behind"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_loss_that_fails_is_not_tried_again(plain_run: Path, tmp_path: Path) -> None:
    task = scenes.with_loss(scenes.failing_loss, str(tmp_path))
    told = scenes.Told(done=3, then=(tmp_path / "fail").touch)
    with pytest.raises(IncompleteError, match="no such class"):
        analyze(plain_run, task, tmp_path / "out", 1, span_length=3, on_progress=told)
    assert len((tmp_path / "failures").read_text().split()) == 3  # one for each span that is left


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_hold_the_custom_resources_that_were_asked_for(
    plain_run: Path, tmp_path: Path
) -> None:
    seen: list[float] = []
    told = scenes.Told(done=0, then=lambda: seen.append(ray.available_resources().get("slot", 0)))
    resources = Resources(workers=1, custom={"slot": 1.5})
    out = tmp_path / "out"
    lcray.analyze(plain_run, "scenes:plain", out, resources=resources, on_progress=told)
    assert seen == [0.5]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_metrics_are_there_to_be_scraped(plain_run: Path, tmp_path: Path) -> None:
    failing = scenes.with_loss(scenes.failing_loss, str(tmp_path))
    told = scenes.Told(done=6, then=(tmp_path / "fail").touch)
    with pytest.raises(IncompleteError):
        analyze(plain_run, failing, tmp_path / "half", 1, span_length=6, on_progress=told)
    analyze(plain_run, "scenes:plain", tmp_path / "out", 1, span_length=6)
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    rows = lcray.open(tmp_path / "out").intervals()
    gap = rows[rows["split"] == "train"]["gap"].sum()
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    # Exported now and then: what is there first may be how far it was before the last span.
    while found.get("ray_lcray_gap") != pytest.approx(gap, rel=1e-9):
        assert time.monotonic() < deadline, (gap, found)
        time.sleep(1)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
            found = {
                re.split(r"[{ ]", line)[0]: float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("ray_lcray_") and 'split="val"' not in line
            }
    # At least those of this analysis: others of this process count as well.
    assert found["ray_lcray_spans_done_total"] >= 2
    assert found["ray_lcray_spans_failed_total"] >= 1
    assert found["ray_lcray_intervals_total"] >= 12
    assert found["ray_lcray_gradients_total"] >= 2 * 2 * 12


def alive_actors() -> list[dict[str, Any]]:
    """The actors of the shared Ray that live, from its own books."""
    from ray._private.state import actors

    return [{"actor_id": name} for name, actor in actors().items() if actor["State"] != "DEAD"]


class TestShipment:
    def test_an_object_that_cannot_be_sent(self) -> None:
        task = Task(scenes.build_plain, {"train": (threading.Lock(),)}, scenes.cross_entropy)
        with pytest.raises(TaskError, match=r"cannot be sent to workers.*name it module:attribute"):
            Shipment.pack(TaskSource("<Task object>", task))

    def test_an_object_whose_code_is_not_there(self) -> None:
        packed = Shipment((), b"cnowhere_at_all\nTask\n.")
        with pytest.raises(TaskError, match=r"cannot be loaded on a worker.*nowhere_at_all"):
            packed.unpack()

    def test_folders_follow_once_and_only_where_they_exist(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = str(tmp_path)
        monkeypatch.setattr("sys.path", ["first", here, "/no/such/folder"])
        packed = Shipment.pack(locate("scenes:plain"))
        path = ["worker"]
        monkeypatch.setattr("sys.path", path)
        assert packed.unpack() == locate("scenes:plain")
        packed.unpack()
        assert path == ["worker", here]


class TestResources:
    @pytest.mark.parametrize(
        ("resources", "message"),
        [
            (Resources(workers=0), "workers 0: must be at least 1"),
            (Resources(cpus_per_worker=64), "no node has 64 CPUs and 0 GPUs"),
            (Resources(gpus_per_worker=1), "no node has 1 CPUs and 1 GPUs; ask for less"),
            (Resources(custom={"slot": 3}), "no node has 1 CPUs and 0 GPUs and 3 slot; ask"),
            (Resources(custom={"slot": -1}), "resource slot -1: must not be negative"),
            (Resources(custom={"GPU": 1}), "resource 'GPU': is reserved; use --gpus-per-worker"),
            (Resources(patience=0), "patience 0: must be positive, in seconds"),
        ],
    )
    @pytest.mark.usefixtures("ray_cluster")
    def test_what_cannot_be_had_is_refused(
        self, plain_run: Path, resources: Resources, message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            lcray.plan(plain_run, "scenes:plain", resources=resources)

    @pytest.mark.parametrize(
        ("resources", "limit", "expected"),
        [
            (Resources(), 12, 4),  # one a CPU of the shared Ray
            (Resources(cpus_per_worker=1.5), 12, 2),
            (Resources(cpus_per_worker=3), 12, 1),
            (Resources(workers=9), 12, 9),
            (Resources(workers=9), 5, 5),  # no more than there is work for
            (Resources(), 0, 1),
            (Resources(custom={"slot": 1}), 12, 2),
            (Resources(custom={"slot": 0.5}, cpus_per_worker=0), 12, 4),
        ],
    )
    @pytest.mark.usefixtures("ray_cluster")
    def test_the_number_of_workers(
        self, plain_run: Path, resources: Resources, limit: int, expected: int
    ) -> None:
        source = locate("scenes:plain")
        options = {"steps": None, "threads": 1, "limit": limit}
        pool = Pool(source, str(plain_run), SETTINGS, resources, **options)
        assert pool.size == expected

    @pytest.mark.parametrize(
        ("gpus", "asked", "count", "each"), [(2, None, 2, 1.0), (1, 0.25, 4, 0.25), (2, 0, 8, 0)]
    )
    def test_gpus(
        self,
        gpus: int,
        asked: float | None,
        count: int,
        each: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        has = {"CPU": 8.0, "GPU": float(gpus)}
        monkeypatch.setattr(ray, "cluster_resources", lambda: has)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": has}])
        resources = Resources(gpus_per_worker=asked)
        options = {"steps": None, "threads": 1, "limit": 99}
        pool = Pool(locate("scenes:plain"), "", SETTINGS, resources, **options)
        assert pool.size == count
        assert pool._crew._placed.gpus == each


class TestConnection:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Calls of ray.init (with its options) and ray.shutdown, which do nothing."""
        found: list[Any] = []
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **options: found.append(options))
        monkeypatch.setattr(ray, "shutdown", lambda: found.append("shutdown"))
        return found

    def test_its_own_ray_by_default(self, calls: list[Any]) -> None:
        with pytest.raises(KeyError), connection(Resources()):
            raise KeyError
        options, end = calls
        assert (options["address"], options["include_dashboard"], end) == (
            "local",
            False,
            "shutdown",
        )

    def test_the_address_and_the_environment(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as there:
            address = f"127.0.0.1:{there.getsockname()[1]}"
            monkeypatch.setenv("RAY_ADDRESS", address)
            remote = Resources(address="ray://here:2")
            with connection(Resources()), connection(remote):
                pass
        assert [call["address"] for call in calls[:2]] == [address, "ray://here:2"]
        assert "object_store_memory" not in calls[0]  # refused by a cluster that exists

    def test_workers_of_its_own_ray_get_an_environment(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[dict[str, str]] = []
        monkeypatch.setattr(ray, "init", lambda **options: seen.append(dict(os.environ)))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        for resources in (Resources(threads=3), Resources(threads=3, address="ray://here:2")):
            with connection(resources):
                assert os.environ["OMP_NUM_THREADS"] == "1"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for resources in (Resources(), Resources(gpus_per_worker=0)):
            with connection(resources):
                pass
        assert [found["GLIBC_TUNABLES"].endswith("hugetlb=1") for found in seen] == [
            True, False, False, True,
        ]  # fmt: skip
        assert [found["OMP_NUM_THREADS"] for found in seen] == ["3", "1", "1", "1"]
        assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.perturb=0"

    def test_a_ray_that_is_there_is_used_and_left(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        with connection(Resources(address="elsewhere:1")):
            pass
        assert calls == []

    def test_a_cluster_that_cannot_be_reached(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**options: Any) -> None:
            raise ConnectionError("first\nno route")

        monkeypatch.setattr(ray, "init", refuse)
        with (
            pytest.raises(ClusterError, match=r"Ray at 'auto': cannot be .*Error: no route\)"),
            connection(Resources(address="auto")),
        ):
            pass
        assert calls == []

    def test_nobody_listens(self, calls: list[Any]) -> None:
        """Ray itself would end the process, after a minute."""
        with (
            pytest.raises(ClusterError, match=r"Ray at '127\.0\.0\.1:1': cannot be .*refused"),
            connection(Resources(address="127.0.0.1:1")),
        ):
            pass
        assert calls == []

    def test_the_handler_of_sigterm_outlives_rays(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ours(*_: object) -> None: ...

        take = partial(signal.signal, signal.SIGTERM, lambda *_: None)
        monkeypatch.setattr(ray, "init", lambda **options: take())
        before = signal.signal(signal.SIGTERM, ours)
        try:
            with connection(Resources()):
                assert signal.getsignal(signal.SIGTERM) is ours
        finally:
            signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_every_worker_follows_the_batches_of_the_plan(plain_run: Path, tmp_path: Path) -> None:
    """The settings leave them open, so that a worker by itself would take others."""
    one = Resources(workers=1)
    plans = [
        lcray.plan(plain_run, "scenes:plain", resources=one, span_length=2, batch_size=size).plan
        for size in (4, 256)
    ]
    left_open = replace(plans[0], settings=replace(plans[0].settings, batch_size=None))
    outs = [tmp_path / name for name in ("four", "most", "open")]
    for out, plan, workers in zip(outs, [*plans, left_open], (1, 1, 3), strict=True):
        analyze(plain_run, "scenes:plain", out, workers, plan=plan)
    found = [scenes.tables(out) for out in outs]
    for tables in found:
        tables.pop("manifest.json")  # it knows the settings as well
    four, most, opened = found
    assert opened == four != most


def test_a_worker_sets_its_process_up_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, device in (([], "cpu"), ([0], "cuda")):
        tuned: list[str] = []
        monkeypatch.setattr(ray, "get_gpu_ids", lambda gpus=gpus: gpus)
        monkeypatch.setattr(actor, "tune_process", tuned.append)
        actor.Worker()
        assert tuned == [device]


NODE = {"CPU": 8.0, "GPU": 2.0}


class TestPlacement:
    @pytest.mark.parametrize(
        ("resources", "nodes", "limit", "workers", "sharers"),
        [
            (Resources(), [{"CPU": 8.0}], 99, 8, 8),
            (Resources(), [{"CPU": 8.0}], 3, 3, 3),
            (Resources(workers=2), [{"CPU": 8.0}], 99, 2, 2),
            (Resources(cpus_per_worker=3), [{"CPU": 8.0}], 99, 2, 2),
            # On two nodes a worker shares its memory with those on its own.
            (Resources(), [{"CPU": 2.0}, {"CPU": 6.0}], 99, 8, 6),
            (Resources(), [NODE], 99, 2, 1),
            (Resources(gpus_per_worker=0.25), [NODE], 99, 8, 4),
            (Resources(gpus_per_worker=0.25), [NODE], 3, 3, 3),
            (Resources(gpus_per_worker=2), [NODE], 99, 1, 1),
            (Resources(gpus_per_worker=0), [NODE], 99, 8, 8),
            # What is left over on each node is of no use to anybody.
            (Resources(cpus_per_worker=3), [{"CPU": 4.0}, {"CPU": 4.0}], 99, 2, 1),
            (Resources(cpus_per_worker=0.1), [{"CPU": 0.3}], 99, 3, 3),
            (Resources(custom={"slot": 2}), [{"CPU": 8.0, "slot": 5.0}, NODE], 99, 2, 2),
        ],
    )
    def test_who_shares_memory(
        self,
        resources: Resources,
        nodes: list[dict[str, float]],
        limit: int,
        workers: int,
        sharers: int,
    ) -> None:
        found = place_workers(resources, nodes, limit)
        assert (found.workers, found.sharers, found.memory) == (workers, sharers, None)

    def test_memory_that_is_asked_for(self) -> None:
        assert place_workers(Resources(memory=1.5), [NODE], 9).memory == 3 * 2**29
        for memory in (0, -1.0, float("nan")):
            with pytest.raises(UsageError, match=r"^memory .*: must be positive, in GiB"):
                place_workers(Resources(memory=memory), [NODE], 9)


def test_the_worker_in_this_process_stands_for_the_pool() -> None:
    """`scenes.InlinePool` may replace a `Pool` only as long as it offers what analyses use."""
    used, inline, elsewhere = (
        {name for name in vars(kind) if not name.startswith("_")}
        for kind in (Pool, scenes.InlinePool, SupervisedPool)
    )
    assert used == inline == elsewhere


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("option", ["cpus_per_worker", "gpus_per_worker"])
def test_negative_resources_are_refused(option: str, plain_run: Path, tmp_path: Path) -> None:
    resources = Resources(workers=1, **{option: -1.0})
    with pytest.raises(UsageError, match=f"^{option.replace('_', '-')} -1.0: must not be negative"):
        lcray.analyze(plain_run, "scenes:plain", tmp_path / "out", resources=resources)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_an_answer_that_was_lost_costs_no_second_computation(
    plain_run: Path, plain_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call may have done its work although it raises: the commit says so."""
    original, reports = dispatch.result, []

    def result(reference: Any) -> Any:
        found = original(reference)
        if isinstance(found, SpanReport):
            reports.append(found)
            if len(reports) == 1:
                raise ray.exceptions.ActorUnavailableError("the connection was lost", b"\0" * 16)
        return found

    monkeypatch.setattr(dispatch, "result", result)
    monkeypatch.setattr(dispatch, "fetched", lambda references: {})  # one by one, that is
    out = tmp_path / "out"
    analyze(plain_run, "scenes:plain", out, 1, span_length=3, elements=True)
    assert [report.committed for report in reports] == [True, False, True, True, True]
    assert reports[1] == replace(reports[0], committed=False)  # to the nanosecond: the same one
    assert {path.name.split("-")[1] for path in out.rglob("layers-*.parquet")} == {"1"}
    assert scenes.tables(out) == scenes.tables(plain_out)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_ray_ends_for_its_memory_is_a_lost_worker(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says so by an error that is not one of a dead actor."""
    original, reports, out = dispatch.result, [], tmp_path / "out"

    def result(reference: Any) -> Any:
        found = original(reference)
        if isinstance(found, SpanReport):
            reports.append(found)
            if len(reports) <= ATTEMPTS:  # the first of two spans, killed in the middle
                (out / "shards" / "00000000-00000006" / "commit.json").unlink()
                raise ray.exceptions.OutOfMemoryError("the node ran low on memory")
        return found

    monkeypatch.setattr(dispatch, "result", result)
    monkeypatch.setattr(dispatch, "fetched", lambda references: {})  # one by one, that is
    told = scenes.Told()
    with pytest.raises(IncompleteError) as caught:
        analyze(plain_run, "scenes:plain", out, 1, span_length=6, on_progress=told)
    assert "0-6: its worker died (OutOfMemoryError: the node ran low" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(reports) == ATTEMPTS + 1
    assert [*dict.fromkeys(told.counts)] == [0, 6]
