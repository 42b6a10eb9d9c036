"""Which machine this is, and whether one of its processes is alive, whatever the clock says."""

from __future__ import annotations

import errno
import os
import platform
import uuid
from pathlib import Path


def exists(pid: int) -> bool:
    """Whether this machine has a process or a thread of that number."""
    try:
        os.kill(max(pid, 1), 0)  # 0 and negative numbers would be groups
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid > 0


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the boot: field 22 of its stat, proc(5).

    Setting the clock does not change it. It does change the time of the boot, and so the start
    time that psutil gives.

    Raises:
        OSError: if the system does not say.
    """
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError(errno.ENOTSUP, "/proc is that of another set of processes")
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat.rpartition(b")")[2].split()[19])  # the name before it may contain anything


def machine() -> str:
    """The same for two processes only if they see each other: boot id and set of processes.

    Where the system does not say, it is the machine's name and address.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode():x}"
