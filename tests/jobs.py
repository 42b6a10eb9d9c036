"""Analyses on a real cluster of three nodes, in slow motion: for `test_faults` and the soak."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import scenes
from repository import PACKAGE, TESTS

import lcray
from lcray.planning.plan import Plan
from lcray.storage.files import FORMAT_VERSION

STEPS, SPAN = 24, 2
PATH = os.pathsep.join([str(TESTS), str(PACKAGE.parent)])
_NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
# Nodes that have gone are noticed within seconds.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def three_nodes() -> Iterator[Any]:
    """A cluster of three nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    head = {"include_dashboard": False, "_system_config": _HEALTH, **_NODE}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        fill(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def fill(cluster: Any, nodes: int = 3) -> Any:
    """Add nodes until there are so many; the last one that was added."""
    tries, node = 0, None
    while len(cluster.list_all_nodes()) < nodes:
        tries += 1
        try:
            node = cluster.add_node(**_NODE)
        except Exception:  # Ray raises no other: a busy machine takes more than 30 s to start one
            if tries > 4:
                raise
    return node


def kill_node(cluster: Any, of: Collection[int] | None = None) -> Any:
    """Kill the raylet of a node that is not the head: its worker is an orphan, and may write on.

    With `of`, of a node that has started one of these processes.
    """
    nodes = [node for node in cluster.list_all_nodes() if not node.head]
    node = next(node for node in nodes if of is None or workers_of(node) & {*of})
    process = node.all_processes["raylet"][0].process
    process.kill()
    process.wait()
    return node


def replace_node(cluster: Any) -> Any:
    """Kill a node; returns another one that joins."""
    cluster.remove_node(kill_node(cluster), allow_graceful=False)
    return fill(cluster)


def workers_of(node: Any) -> set[int]:
    """The processes that the raylet of a node has started."""
    raylet = node.all_processes["raylet"][0].process.pid
    return {child.pid for child in psutil.Process(raylet).children()}


@dataclass(frozen=True)
class Undisturbed:
    """A run, the plan that it is analyzed by, and the tables of it."""

    run: Path
    plan: Plan
    tables: dict[str, bytes] = field(repr=False)


def analyze_undisturbed(folder: Path, **options: Any) -> Undisturbed:
    """In this process, without Ray."""
    run = scenes.record(scenes.plain, folder / "run", steps=STEPS)
    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        options |= {"span_length": SPAN, "elements": True}
        found = lcray.analyze(run, "scenes:plain", folder / "out", **options)
    return Undisturbed(run, found.plan, scenes.tables(folder / "out"))


@dataclass
class Job:
    """An analysis on the cluster, in slow motion as long as ``folder/slow`` is there."""

    folder: Path
    run: Path
    address: str
    undisturbed: Undisturbed
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *options: object) -> subprocess.Popen[str]:
        (self.folder / "slow").write_text(str(self.out / "analysis.json"))
        command = [
            sys.executable, "-m", "lcray", "analyze", self.run, "--out", self.out,
            "--task", f"{self.folder}/task.py:task", "--plan", self.folder / "plan.json",
            "--address", self.address, *options,
        ]  # fmt: skip
        driver = subprocess.Popen(
            [*map(str, command)],
            env=scenes.python_environment() | {"PYTHONPATH": PATH},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.drivers.append(driver)
        return driver

    def finish(self, driver: subprocess.Popen[str], code: int = 0) -> str:
        """Full speed until the end; what was said on stderr."""
        (self.folder / "slow").unlink(missing_ok=True)
        _, err = driver.communicate(timeout=200)
        assert driver.returncode == code, err
        assert "Traceback" not in err
        return err

    def check(self) -> None:
        """The tables are those of an undisturbed analysis, and all invariants hold."""
        assert scenes.tables(self.out) == self.undisturbed.tables
        assert lcray.verify(self.out).problems == ()

    def wait(self, condition: Callable[[], Any], seconds: float = 150) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            driver = self.drivers[-1]
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.05)
        return found

    def done(self) -> int:
        return len(scenes.spans_of(self.out))

    def at_work(self) -> set[int]:
        """Workers that have evaluated a batch within the last two seconds."""
        found = set()
        for path in self.folder.glob("at-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime < 2 and psutil.pid_exists(pid(path)):
                    found.add(pid(path))
        return found

    def commits(self) -> dict[str, tuple[int, int, bytes]]:
        """As `scenes.commits`, without what killed attempts have left beside a commit."""
        found = scenes.commits(self.out)
        counting = {}
        for name, state in found.items():
            commit = json.loads(found[f"{os.path.dirname(name)}/commit.json"][2])
            if name.endswith(("commit.json", f"-{commit['attempt']}.parquet")):
                counting[name] = state
        return counting

    def tries(self) -> list[int]:
        """Which try at each span was the one that counts."""
        files = self.out.glob("shards/*/commit.json")
        return [int(json.loads(file.read_text())["attempt"].split("-")[0]) for file in files]


def make_job(folder: Path, address: str, undisturbed: Undisturbed) -> Job:
    (folder / "task.py").write_text(
        f"import scenes\ntask = scenes.with_loss(scenes.paced_loss, {str(folder)!r})\n"
    )
    plan = {"format_version": FORMAT_VERSION, "plan": undisturbed.plan.to_dict()}
    (folder / "plan.json").write_text(json.dumps(plan))
    run = folder / "run"
    run.mkdir()
    for path in undisturbed.run.iterdir():  # a copy, to be damaged
        (run / path.name).write_bytes(path.read_bytes())
    return Job(folder, run, address, undisturbed)


def pid(path: Path) -> int:
    """The process that a file ``at-…`` or ``held-…`` is of."""
    return int(path.name.partition("-")[2])
