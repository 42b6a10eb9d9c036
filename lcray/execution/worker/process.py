"""Processes of workers: memory, environment, end.

Only CPU workers are tuned.

Activations are freed and allocated anew in every batch. By default glibc gives memory of that size
back to the kernel each time, and the kernel zeroes it page by page when it is asked for again,
which costs convolutional networks up to half their time. Keeping it costs resident memory: a
worker stays at its largest size. Nothing is changed in a user's own process.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import psutil

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_NEVER = 2**31 - 1  # an int: a larger value would be truncated to a small one
_PATIENCE = 5.0  # seconds until the killed processes of a session must be gone
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def tune_process(device: str) -> bool:
    """Have this process keep the memory that it frees; call this before anything else.

    Args:
        device: where the process computes; nothing is changed for ``cuda``.

    Returns:
        Whether it took effect: it does with glibc on Linux, and on the CPU.
    """
    if device.startswith("cuda") or sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - missing in other libraries
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    # Older versions refuse more than 32 MiB. One arena: others are mapped, and always given back.
    kept = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 1 << 25)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_ARENA_MAX, 1))


def worker_environment(
    device: str = "cpu", threads: int = 1, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Environment variables to start a worker's process with.

    Args:
        device: where it will compute.
        threads: intra-op threads.
        environment: the variables already set; tunables of glibc in it are kept.
    """
    found = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if not device.startswith("cuda"):
        tunables = [environment.get("GLIBC_TUNABLES", ""), _HUGE_PAGES]
        found["GLIBC_TUNABLES"] = ":".join(part for part in tunables if part)
    return found


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block lasts; processes that start in it keep them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def end_session(leader: int) -> None:
    """Kill every process of a session but its leader and this one, and wait until they are gone.

    The leader must not have been waited for, so that its number still means this session.
    """
    deadline = time.monotonic() + _PATIENCE
    while (left := _members(leader)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.2)


def _members(leader: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if pid not in (leader, os.getpid()) and os.getsid(pid) == leader:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found
