"""A machine of one's own to start servers on: namespaces with nothing but a loopback interface.

A Ray head listens on every interface of the machine it is on; here there is only the one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from repository import ROOT

TOOLS = ("unshare", "nsenter", "ip")


@dataclass(frozen=True)
class Machine:
    """Network, process and mount namespaces of their own.

    Attributes:
        pid: of its first process, as seen from outside.
        folder: for its files; short, since paths of sockets are.
        environment: of every process that is started on it.
    """

    pid: int
    folder: Path
    environment: Mapping[str, str]

    def start(
        self,
        *command: object,
        env: Mapping[str, str | None] | None = None,
        spaces: tuple[str, ...] = ("net", "pid", "mount"),
        **options: Any,
    ) -> subprocess.Popen[str]:
        """A process on it, in a group of its own.

        Args:
            command: the program and its arguments.
            env: variables besides the machine's; those that are None are taken away.
            spaces: namespaces to enter; with ``net`` alone the process is the program itself,
                which a signal reaches, else its parent.
            **options: of Popen.
        """
        chosen: dict[str, str | None] = {**self.environment, **(env or {})}
        enter = [f"--target={self.pid}", *(f"--{space}" for space in spaces), "--wd=.", "--"]
        return subprocess.Popen(
            ["nsenter", *enter, *map(str, command)],
            env={name: value for name, value in chosen.items() if value is not None},
            text=True,
            start_new_session=True,
            # A shell's background jobs ignore SIGINT, and so would this one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(
        self, *command: object, timeout: float = 240, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """What a command on it did."""
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def skip_without(*tools: str) -> None:
    """Skip where a machine of its own cannot be had, or a program is missing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in (*TOOLS, *tools) if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: needs util-linux, iproute2 {' '.join(tools)}")
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces for a machine with only a loopback interface")
    if subprocess.run(["unshare", "-n", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("unshare is not permitted here: no namespaces for a machine of its own")


@contextmanager
def machine(**environment: str) -> Iterator[Machine]:
    """A machine, with these variables set; every process on it ends with the block."""
    skip_without()
    folder = Path(tempfile.mkdtemp(prefix="lcray-"))
    alone = ("unshare", "-n", "--pid", "--fork", "--mount-proc", "--kill-child")
    script = f"ip link set lo up && touch {folder}/up && exec sleep 3600"
    holder = subprocess.Popen([*alone, "sh", "-c", script])
    try:
        deadline = time.monotonic() + 30
        while not (folder / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        first = psutil.Process(holder.pid).children()[0].pid
        yield Machine(first, folder, _environment(folder) | environment)
    finally:
        holder.kill()
        holder.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of the caller's but where programs are: no tokens, no addresses, another home."""
    (folder / "home").mkdir()
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    return {
        "PATH": programs,
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LANG": "C.UTF-8",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
