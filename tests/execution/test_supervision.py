"""When Ray itself ends, or cannot start: real kills, real folders, real control groups."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
import ray
import scenes

import lcray
from lcray.errors import ClusterError, UsageError
from lcray.execution.cluster import private, supervision
from lcray.execution.cluster.connect import Address, connection
from lcray.execution.cluster.resources import Resources, usable_cores
from lcray.execution.cluster.supervision import workplace

pytestmark = pytest.mark.ray


@dataclass
class Driver:
    """``lcray analyze`` in slow motion."""

    folder: Path
    run: Path
    process: subprocess.Popen[str] | None = None

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *options: object, **variables: str) -> None:
        (self.folder / "slow").write_text(str(self.out / "analysis.json"))
        (self.folder / "task.py").write_text(
            f"import scenes\ntask = scenes.with_loss(scenes.paced_loss, {str(self.folder)!r})\n"
        )
        command = [
            *(sys.executable, "-m", "lcray", "analyze", self.run, "--out", self.out, "--elements"),
            *("--task", f"{self.folder}/task.py:task", "--span-length", 3, "--workers", 2),
            *options,
        ]
        self.process = subprocess.Popen(
            [*map(str, command)],
            env=scenes.python_environment() | {"PYTHONPATH": jobs.PATH} | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def spans(self) -> int:
        return len(scenes.spans_of(self.out))

    def wait(self, condition: Callable[[], Any]) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 150
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.1)

    def finish(self, code: int) -> list[str]:
        """The lines that it wrote to stderr, at full speed."""
        assert self.process is not None
        (self.folder / "slow").unlink(missing_ok=True)
        _, err = self.process.communicate(timeout=200)
        assert self.process.returncode == code, err
        return err.splitlines()

    def others(self, name: str = "") -> list[psutil.Process]:
        """The processes that it has started, and those that they have."""
        assert self.process is not None
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in found if lives(process) and name in process.name()]

    def kill(self, name: str) -> None:
        (victim,) = self.others(name)
        victim.kill()

    def commits(self) -> dict[str, Any]:
        """Those of the spans; attempts that were killed may have left files beside them."""
        found = scenes.commits(self.out)
        return {name: state for name, state in found.items() if name.endswith("commit.json")}

    def state(self) -> str:
        return str(json.loads((self.out / "status.json").read_text())["state"])


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def driver(plain_run: Path, tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path, plain_run)
    yield made
    if made.process is not None:
        made.process.kill()  # and the others end
        made.process.communicate()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="lt-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_ray_of_ones_own_that_ends_is_started_again_but_once(
    driver: Driver, plain_out: Path, short: Path
) -> None:
    driver.start(RAY_TMPDIR=str(short))
    driver.wait(lambda: driver.spans() >= 1)
    (folder,) = short.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    driver.kill("raylet")
    before = driver.spans()
    driver.wait(lambda: driver.spans() > before)
    (other,) = short.iterdir()
    assert other != folder
    before_the_end = driver.others()
    driver.kill("ray::RuntimeEnv")
    *said, last = driver.finish(code=1)
    assert sum("restarting it once" in line for line in said) == 1
    assert last.startswith("lcray: Ray on this machine: has ended again, after it was started anew")
    assert not any("Traceback" in line or "state-dump" in line for line in said)
    found = lcray.status(driver.out)
    assert (driver.state(), found.state, found.workers) == ("failed", "failed", 0)
    assert f"lcray: {found.error}" == last
    assert not [process for process in before_the_end if lives(process)]
    assert not [*short.iterdir()]
    kept = driver.commits()

    driver.start()
    before = driver.spans()
    if before < 4:
        driver.wait(lambda: driver.others("ray::Worker"))
        driver.kill("gcs_server")
    assert any("restarting it once" in line for line in driver.finish(code=0))
    assert kept.items() <= driver.commits().items()
    assert scenes.tables(driver.out) == scenes.tables(plain_out)
    assert driver.state() == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_driver(driver: Driver, short: Path, number: signal.Signals) -> None:
    driver.start(RAY_TMPDIR=str(short))
    driver.wait(lambda: driver.spans() >= 1)
    others = driver.others()
    names = " ".join(process.name() for process in others)
    assert all(part in names for part in ("gcs_server", "raylet", "ray::Dashboard", "ray::Worker"))
    assert driver.process is not None
    driver.process.send_signal(number)
    end = time.monotonic() + 10
    while any(map(lives, others)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [process for process in others if lives(process)] == []
    assert not [*short.iterdir()]
    assert driver.process.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)


@pytest.mark.slow
def test_another_ray_that_ends_is_told_in_one_line(driver: Driver) -> None:
    from ray.cluster_utils import Cluster

    node = {"include_dashboard": False, "num_cpus": 2, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=node)
    address = cluster.address
    try:
        driver.start("--address", address)
        driver.wait(lambda: driver.spans() >= 1)
        raylet = cluster.head_node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()
        last = driver.finish(code=1)[-1]
    finally:
        cluster.shutdown()
    assert last.startswith(f"lcray: Ray at '{address}': has ended in the middle of the")
    assert driver.state() == "failed"


PLAN = """
import json, lcray, ray, sys
report = lcray.plan(sys.argv[1], "scenes:plain", resources=lcray.Resources(local=False))
assert not ray.is_initialized()
print(json.dumps([report.workers, sorted(report.estimate.__dict__)]))
"""


@pytest.mark.slow
def test_a_machine_with_long_paths_and_one_core(plain_run: Path, tmp_path: Path) -> None:
    """A home that cannot be written to, sockets beyond 107 bytes; the machine has more cores."""
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("needs two cores, to be allowed one of them")
    far = tmp_path / ("far" * 30)
    far.mkdir()
    environment = scenes.python_environment() | {"TMPDIR": str(far), "HOME": "/dev/null"}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_TMPDIR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(plain_run)],
        env=environment | {"PYTHONPATH": jobs.PATH},
        preexec_fn=lambda: os.sched_setaffinity(0, {min(cores)}),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == 1


class TestFolder:
    def test_short_wherever_it_has_to_be(
        self, short: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        longest = short / ("x" * 80)
        longest.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(longest))
        made = private.make_folder({})
        private.remove(made)
        assert made.parent != longest and not made.exists()
        assert len(f"{private.temporary(made)}/session_{'x' * 34}/sockets/plasma_store") <= 107

    def test_a_place_that_cannot_be_had(self, tmp_path: Path) -> None:
        too_long = str(tmp_path / ("x" * 100))
        with pytest.raises(ClusterError, match=r"^RAY_TMPDIR '.*xx': paths .* at most \d\d bytes$"):
            private.make_folder({"RAY_TMPDIR": too_long})
        with pytest.raises(ClusterError, match=r"\(/dev/null: .*\); set RAY_TMPDIR to a folder"):
            private.make_folder({"RAY_TMPDIR": "/dev/null"})


class TestAddress:
    @pytest.fixture(autouse=True)
    def unconnected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever Ray other tests share with this process."""
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def test_that_of_a_dashboard(self, monkeypatch: pytest.MonkeyPatch) -> None:
        address = "http://127.0.0.1:8265"
        option = rf"^address '{address}': is a dashboard's address.*; here give HEAD:6379"
        with pytest.raises(UsageError, match=option), workplace(Resources(address=address)):
            pass
        monkeypatch.setenv("RAY_ADDRESS", address)
        variable = rf"^RAY_ADDRESS '{address}': .*; here unset it for a Ray of lcray's own, or give"
        with pytest.raises(UsageError, match=variable), workplace(Resources()):
            pass

    def test_which_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert Address.of(Resources()) == Address("local")
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        assert Address.of(Resources()) == Address("head:6379", "RAY_ADDRESS")
        assert Address.of(Resources(address="other:6379")) == Address("other:6379")
        assert Address.of(Resources(address="local")).is_own

    @pytest.mark.slow
    def test_somebody_listens_and_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervision, "_TO_CONNECT", 2.0)
        before = {*psutil.Process().children()}
        with socket.create_server(("127.0.0.1", 0)) as there:
            address = f"127.0.0.1:{there.getsockname()[1]}"
            monkeypatch.setenv("RAY_ADDRESS", address)
            expected = rf"^Ray at '{address}' \(RAY_ADDRESS\): cannot be reached \(no answer within"
            with pytest.raises(ClusterError, match=expected), workplace(Resources()):
                pass
        assert {*psutil.Process().children()} <= before

    def test_bare_errors_of_a_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(**options: Any) -> None:
            raise Exception("The current node timed out during startup. This could happen because")

        monkeypatch.setattr(ray, "init", fail)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(ClusterError) as caught, connection(Resources()):
            pass
        text = str(caught.value)
        assert text.startswith("Ray on this machine: could not be started (Exception: ")
        assert "timed out during startup" in text and "cluster up" not in text


class TestCores:
    def test_the_affinity(self) -> None:
        cores = os.sched_getaffinity(0)
        program = (
            "from lcray.execution.cluster.resources import usable_cores; print(usable_cores())"
        )
        found = subprocess.run(
            [sys.executable, "-c", program],
            env=scenes.python_environment() | {"PYTHONPATH": jobs.PATH},
            preexec_fn=lambda: os.sched_setaffinity(0, {min(cores)}),
            capture_output=True,
            text=True,
        )
        assert found.stdout == "1\n", found.stderr
        assert usable_cores() <= len(cores)

    def test_a_control_group(self) -> None:
        """Of as much time as half the cores of this machine have, and no less than one."""
        program = (
            "from lcray.execution.cluster.resources import usable_cores; print(usable_cores())"
        )
        cores = len(os.sched_getaffinity(0))
        with control_group(quota=50_000 * cores, period=100_000) as tasks:
            command = f"echo $$ > {tasks}; exec {shlex.join([sys.executable, '-c', program])}"
            found = subprocess.run(
                ["sh", "-c", command],
                env=scenes.python_environment() | {"PYTHONPATH": jobs.PATH},
                capture_output=True,
                text=True,
            )
        assert found.stdout == f"{max(1, cores // 2)}\n", found.stderr

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({"a/b/cpu.max": "max 100000"}, []),
            ({"a/b/cpu.max": "150000 100000"}, [1.5]),
            ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, [2.0]),
            ({"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, []),
            ({"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "50000"}, [6.0]),
            ({"cpu.max": "100000 100000"}, [1.0]),  # of a container: its own group is the root
            ({"a/b/cpu.max": "nonsense"}, []),
        ],
    )
    def test_limits(self, limits: dict[str, str], expected: list[float], tmp_path: Path) -> None:
        from lcray.execution.cluster.resources import quota_of
        from lcray.tasks.model.memory import control_groups

        groups, own = tmp_path / "groups", tmp_path / "own"
        own.write_text("3:cpu,cpuacct:/job\n2:memory:/other\n0::/a/b\n")
        for name, text in limits.items():
            path = groups / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        quotas = [quota_of(group) for group in control_groups("cpu", own, groups)]
        assert [quota for quota in quotas if quota is not None] == expected
        assert list(control_groups("cpu", tmp_path / "none", groups)) == []


@contextlib.contextmanager
def control_group(quota: int, period: int) -> Iterator[Path]:
    """A control group with a limit of CPU time; gives the file to write members to."""
    name = f"lcray-test-{os.getpid()}"
    for group in (Path("/sys/fs/cgroup/cpu", name), Path("/sys/fs/cgroup", name)):
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                if (group / "cpu.max").exists():
                    (group / "cpu.max").write_text(f"{quota} {period}")
                else:
                    (group / "cpu.cfs_period_us").write_text(str(period))
                    (group / "cpu.cfs_quota_us").write_text(str(quota))
                yield group / "cgroup.procs"
                return
            finally:
                group.rmdir()
    pytest.skip("control groups can be made by root only, where /sys/fs/cgroup is writable")
