"""A worker's process: page faults are counted, not timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import scenes

from lcray.execution.worker.process import (
    end_session,
    environment,
    tune_process,
    worker_environment,
)

FAULTS = """
import resource, sys
from lcray.execution.worker.process import tune_process
took_effect = tune_process(sys.argv[1])
import torch
from torch import nn
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
x = torch.randn(64, 3, 32, 32)

def step():
    net(x).square().mean().backward()
    net.zero_grad()

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(took_effect), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(device: str) -> tuple[bool, int]:
    """Whether tuning took effect, and page faults of ten steps of a convolutional network."""
    # glibc's own defaults, whatever the tests run under.
    kept = {k: v for k, v in scenes.python_environment().items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept)
    effect, count = done.stdout.split()
    return effect == "1", int(count)


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
@pytest.mark.slow
def test_memory_that_is_freed_is_used_again() -> None:
    """A map of 3.7 MB is 900 pages of 4 KiB, which every step touches anew if it is given back."""
    tuned, few = faults("cpu")
    untouched, many = faults("cuda")
    assert (tuned, untouched) == (True, False)
    assert few < many / 4


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_nothing_is_done_for_gpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert tune_process(device) is False


def refuse(name: object) -> object:
    raise AssertionError("malloc was touched")


class Other:
    """A C library that is not glibc: it has no `gnu_get_libc_version`."""

    def mallopt(self, option: int, value: int) -> int:
        raise AssertionError("options of another malloc")


@pytest.mark.parametrize("library", [Other, object])
def test_other_libraries_are_left_alone(library: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: library())
    assert tune_process("cpu") is False


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", refuse)
    monkeypatch.setattr("sys.platform", "darwin")
    assert tune_process("cpu") is False


class Glibc:
    """Takes options, and refuses a threshold above `most`, as older versions do."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, dict[int, int]()

    def gnu_get_libc_version(self) -> None: ...

    def mallopt(self, option: int, value: int) -> int:
        if option == -3 and value > self.most:
            return 0
        self.taken[option] = value
        return 1


@pytest.mark.parametrize(("most", "threshold"), [(2**62, 2**30), (2**25, 2**25)])
def test_the_options(most: int, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Glibc(most)
    monkeypatch.setattr("ctypes.CDLL", lambda name: libc)
    monkeypatch.setattr("sys.platform", "linux")
    assert tune_process("cpu") is True
    # Of malloc.h: mmap threshold, trim threshold, arenas.
    assert libc.taken == {-3: threshold, -1: 2**31 - 1, -8: 1}
    libc.most = 0
    assert tune_process("cpu") is False


class TestEnvironment:
    def test_of_workers(self) -> None:
        threads = {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
        huge = "glibc.malloc.hugetlb=1"
        assert worker_environment("cpu", 3, {}) == threads | {"GLIBC_TUNABLES": huge}
        assert worker_environment("cuda", 3, {}) == threads
        there = {"GLIBC_TUNABLES": "glibc.malloc.perturb=7"}
        found = worker_environment("cpu", 3, there)
        assert found["GLIBC_TUNABLES"] == f"glibc.malloc.perturb=7:{huge}"

    def test_lasts_as_long_as_the_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LCRAY_A", "before")
        monkeypatch.delenv("LCRAY_B", raising=False)
        with pytest.raises(KeyError), environment({"LCRAY_A": "1", "LCRAY_B": "2"}):
            assert (os.environ["LCRAY_A"], os.environ["LCRAY_B"]) == ("1", "2")
            raise KeyError
        assert os.environ["LCRAY_A"] == "before"
        assert "LCRAY_B" not in os.environ


def test_torch_is_not_imported() -> None:
    """Options of malloc count for what is allocated after them."""
    code = "import sys, lcray.execution.worker.process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=scenes.python_environment())


def test_a_session_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Also who was left by a parent that has ended; neither the leader nor others."""
    script = f"(sleep 60 & echo $! > {tmp_path}/orphan) & sleep 60 & wait"
    leader = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    other = subprocess.Popen(["sleep", "60"])
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "orphan").exists() or len(psutil.Process(leader.pid).children()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        orphan = int((tmp_path / "orphan").read_text())
        assert os.getsid(orphan) == leader.pid
        leader.kill()
        end_session(leader.pid)
        assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == "zombie"
        assert other.poll() is None
    finally:
        for process in (leader, other):
            process.kill()
            process.wait()
