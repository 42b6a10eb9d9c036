"""What happens to a cluster of three nodes, for real; after each the tables are the same.

The driver is a process of its own, as users run it. Every test ends with the tables byte for byte
those of an undisturbed analysis under the same plan, and with `lcray.verify` clean.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
import scenes
from disks import small_disk
from jobs import Job, Undisturbed

import lcray

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with jobs.three_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return jobs.analyze_undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def job(cluster: Any, undisturbed: Undisturbed, tmp_path: Path) -> Iterator[Job]:
    jobs.fill(cluster)  # whatever the test before has done to it
    made = jobs.make_job(tmp_path, cluster.address, undisturbed)
    yield made
    for driver in made.drivers:
        if driver.poll() is None:
            driver.kill()
        driver.communicate()


def soon(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


alive = psutil.pid_exists


def everybody(job: Job) -> set[int]:
    """The three workers, once all of them are at work."""
    found: set[int] = job.wait(lambda: found if len(found := job.at_work()) == 3 else None)
    return found


def test_every_worker_is_killed_in_turn(job: Job) -> None:
    driver = job.start("--workers", 3, "--cpus-per-worker", 0.25)  # all would fit on one node
    first = everybody(job)
    assert len({psutil.Process(pid).ppid() for pid in first}) == 3, "one a node"
    for number, pid in enumerate(first, 1):
        os.kill(pid, signal.SIGKILL)  # in the middle of a span: it evaluated a moment ago
        job.wait(lambda: len(job.at_work() - first) >= number)  # noqa: B023 - called at once
    job.finish(driver)
    assert max(job.tries()) >= 2
    job.check()


def test_a_node_leaves_and_another_one_joins(job: Job, cluster: Any) -> None:
    """Without --workers there are as many as fit: four at times, where there were three."""
    driver = job.start()
    first = everybody(job)
    fourth = jobs.fill(cluster, 4)
    job.wait(lambda: jobs.workers_of(fourth) & job.at_work())
    cluster.remove_node(fourth, allow_graceful=False)
    gone = jobs.kill_node(cluster)
    before = job.done()
    job.wait(lambda: job.done() > before)
    cluster.remove_node(gone, allow_graceful=False)
    new = jobs.fill(cluster)
    on_new = job.wait(lambda: jobs.workers_of(new) & job.at_work())
    assert not on_new & first
    job.finish(driver)
    job.check()


def test_a_node_leaves_with_a_worker_of_a_team(cluster: Any, tmp_path: Path) -> None:
    """A team of two on two nodes: what is left of it is ended, and its room given back."""
    undisturbed = jobs.analyze_undisturbed(tmp_path / "undisturbed", partial_sums=2)
    jobs.fill(cluster)
    job = jobs.make_job(tmp_path, cluster.address, undisturbed)
    driver = job.start("--data-parallel", 2)
    first: set[int] = job.wait(lambda: found if len(found := job.at_work()) == 2 else None)
    assert len({psutil.Process(pid).ppid() for pid in first}) == 2, "one a node"
    before = job.done()
    cluster.remove_node(jobs.kill_node(cluster, first), allow_graceful=False)
    job.wait(lambda: len(job.at_work() - first) == 2)
    job.wait(lambda: job.done() > before)
    job.finish(driver)
    soon(lambda: not any(map(alive, first)))
    assert max(job.tries()) >= 2
    job.check()


def test_the_driver_is_killed_and_started_again(job: Job) -> None:
    driver = job.start("--workers", 3)
    job.wait(lambda: job.done() >= 3)
    workers = job.at_work()
    driver.kill()
    driver.wait()
    kept = scenes.commits(job.out)
    soon(lambda: not any(map(alive, workers)))
    soon(lambda: lcray.status(job.out).silent)
    assert lcray.status(job.out).spans_done == len(scenes.spans_of(job.out)) < 12
    again = job.start("--workers", 3)
    job.finish(again)
    assert kept.items() <= scenes.commits(job.out).items()
    job.check()


def test_ctrl_c_sigterm_and_a_second_driver(job: Job) -> None:
    kept: dict[str, Any] = {}
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        driver = job.start("--workers", 3)
        workers = everybody(job)
        before = len(kept)
        job.wait(lambda: len(job.commits()) > before)  # noqa: B023 - called at once
        if number == signal.SIGINT:
            second = job.start("--workers", 3)
            _, err = second.communicate(timeout=100)
            assert second.returncode == 1
            refused = rf"^lcray: .*out: another lcray process \(on .*, pid {driver.pid}, since"
            assert re.match(refused, err.splitlines()[-1])
        driver.send_signal(number)
        _, err = driver.communicate(timeout=100)
        assert driver.returncode == code, err
        assert err.splitlines()[-1] == "lcray: interrupted; run the same command again to resume"
        assert "Traceback" not in err
        soon(lambda: not any(map(alive, workers)))  # noqa: B023 - called at once
        assert (lcray.status(job.out).state, lcray.status(job.out).workers) == ("interrupted", 0)
        assert kept.items() <= job.commits().items()
        kept = job.commits()
    assert job.done() < 12
    job.finish(job.start("--workers", 3))
    assert kept.items() <= job.commits().items()
    job.check()


def test_a_straggler_is_overtaken(job: Job) -> None:
    """It is patiently waited for, and would take ten minutes."""
    driver = job.start("--workers", 3, "--patience", 500)
    everybody(job)
    (job.folder / "hold").touch()
    held = jobs.pid(job.wait(lambda: next(iter(job.folder.glob("held-*")), None)))
    job.finish(driver)
    soon(lambda: not alive(held))
    assert sorted(job.tries()) == [1] * 11 + [2]
    job.check()


def test_workers_that_hang_or_are_stopped_are_replaced(job: Job) -> None:
    driver = job.start("--workers", 3, "--patience", 15)
    first = everybody(job)
    (job.folder / "hold").touch()
    held = jobs.pid(job.wait(lambda: next(iter(job.folder.glob("held-*")), None)))
    stopped = min(first - {held})
    os.kill(stopped, signal.SIGSTOP)
    job.wait(lambda: len(job.at_work() - {held, stopped}) == 3)
    job.finish(driver)
    soon(lambda: not alive(held) and not alive(stopped))
    assert sorted(job.tries())[-2] >= 2
    job.check()


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 100 MB more than a worker has: the kernel kills who passes that."""
    for root, limit in (("memory", "memory.limit_in_bytes"), (".", "memory.max")):
        group = Path("/sys/fs/cgroup", root, f"lcray-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                yield group / limit
                group.rmdir()
                return
            group.rmdir()
    pytest.skip("control groups can be made by root only, where /sys/fs/cgroup is writable")


def test_a_worker_that_the_kernel_kills_for_its_memory(job: Job, memory_group: Path) -> None:
    driver = job.start("--workers", 2)
    # Both: one alone may still be checking the plan, before there is a span to lose.
    pid = min(job.wait(lambda: both if len(both := job.at_work()) == 2 else None))
    memory_group.write_text(str(psutil.Process(pid).memory_info().rss + 100 * 2**20))
    (memory_group.parent / "cgroup.procs").write_text(str(pid))
    (job.folder / f"eat-{pid}").touch()
    job.wait(lambda: not alive(pid))
    job.finish(driver)
    assert max(job.tries()) == 2
    job.check()


def test_a_checkpoint_that_cannot_be_read_once_and_one_that_never_can(job: Job) -> None:
    once, never = (scenes.checkpoint(job.run, step) for step in (3, 21))
    whole = {path: path.read_bytes() for path in (once, never)}
    for path in (once, never):
        path.write_bytes(whole[path][:-5])
    driver = job.start("--workers", 2)
    job.wait(lambda: job.done() >= 2)  # the second span has failed by then, and is tried again
    assert "00000002-00000004" not in scenes.spans_of(job.out)
    once.write_bytes(whole[once])
    err = job.finish(driver, code=1)
    last = err.splitlines()[-1]
    assert re.search(r"2 intervals are missing \(steps 20-22\): 20-22: .*step-00000021", last)
    found = lcray.status(job.out)
    assert (found.state, found.spans_done, found.error in last) == ("failed", 11, True)
    assert [(span.first, span.last) for span in found.failed] == [(20, 22)]
    assert "step-00000021" in found.failed[0].reason
    assert sorted(job.tries())[-2:] in ([1, 2], [1, 3])
    never.write_bytes(whole[never])
    job.finish(job.start("--workers", 2))
    job.check()


def test_a_disk_that_is_full_when_tables_are_merged(job: Job) -> None:
    driver = job.start("--workers", 3)
    job.wait(lambda: job.done() >= 1)
    with small_disk(job.out / "tables", "32k"):
        err = job.finish(driver, code=1)
        assert re.match(r"lcray: .*out/tables.* \(No space left on device\)", err.splitlines()[-1])
        assert job.done() == 12
        assert list((job.out / "tables").iterdir()) == [], "no half of a table"
    kept = scenes.commits(job.out)
    job.finish(job.start("--workers", 3))
    assert scenes.commits(job.out) == kept
    job.check()


def test_shards_that_are_damaged_later(job: Job) -> None:
    job.finish(job.start("--workers", 3))
    kept = scenes.commits(job.out)
    shards = sorted(job.out.glob("shards/*/layers-*.parquet"))
    torn, flipped = shards[2], shards[7]
    torn.write_bytes(torn.read_bytes()[:-1])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    problems = lcray.verify(job.out).problems
    for path in (torn, flipped):
        assert any(str(path) in problem for problem in problems)
    job.finish(job.start("--workers", 3, "--repair"))
    again = {path.parent.name for path in (torn, flipped)}
    for name, state in scenes.commits(job.out).items():
        assert (name in kept and kept[name] == state) == (Path(name).parent.name not in again)
    job.check()


def test_a_disk_that_fills_up(job: Job) -> None:
    disk = job.out
    with small_disk(disk, "8m"):
        driver = job.start("--workers", 2)
        job.wait(lambda: job.done() >= 2)
        with open(disk / ".ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))
        err = job.finish(driver, code=1)
        assert "No space left on device" in err.splitlines()[-1]
        kept = scenes.commits(job.out)
        (disk / ".ballast").unlink()
        job.finish(job.start("--workers", 2))
        assert kept.items() <= scenes.commits(job.out).items()
        job.check()
