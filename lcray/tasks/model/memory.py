"""How much more memory a process can get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

#: Files of a control group, version 2 and 1: limit, use, and the key in ``memory.stat`` of the page
#: cache that the kernel frees before it refuses memory.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(device: torch.device | None) -> int:
    """Memory of `device` that this process can still get, in bytes; None is the machine's own.

    On CUDA it is the free memory and the memory that torch holds unused. Elsewhere it is the
    smaller of the machine's available memory and the room in the process's control groups.
    """
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    machine = int(psutil.virtual_memory().available)
    room = cgroup_room()
    return machine if room is None else min(machine, room)


def cgroup_room(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int | None:
    """Bytes that the process's control groups still allow; None if none of them has a limit.

    A limit holds for a group and all groups below it, so the least room on the way up counts. A
    container may see its own group as the mount itself, under a path that only the host knows.

    Args:
        membership: lists the groups of the process, one line ``number:controllers:path`` each.
        mount: where control groups are mounted.
    """
    rooms = map(_room, control_groups("memory", membership, mount))
    return min((room for room in rooms if room is not None), default=None)


def control_groups(
    controller: str, membership: Path = _MEMBERSHIP, mount: Path = _MOUNT
) -> Iterator[Path]:
    """The control groups of this process for a resource, and the groups above them.

    Args:
        controller: the resource, such as ``cpu``.
        membership: as for `cgroup_room`.
        mount: where control groups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 has a hierarchy for each controller, version 2 (no name) one for all of them.
        tops = {mount / name for name in (controllers, controller)} if controllers else {mount}
        group = Path(path.lstrip("/"))
        yield from (top / each for top in tops for each in (group, *group.parents))


def _room(group: Path) -> int | None:
    """Bytes that one control group still allows; None if it has no limit, or is not seen here."""
    for limit_file, use_file, cache_key in (_VERSION_2, _VERSION_1):
        limit, use = _number(group / limit_file), _number(group / use_file)
        if limit is not None and use is not None:
            return max(0, limit - max(0, use - _cache(group, cache_key)))
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group here, or its limit is "max"
        return None


def _cache(group: Path, key: str) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[:1] == [key])
    except (OSError, ValueError, IndexError, StopIteration):
        return 0
