"""The share of a machine or cluster that an analysis may use, and how its workers are placed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lcray.errors import UsageError
from lcray.settings import WORKERS, documented, flag_of, option
from lcray.tasks.model.memory import control_groups

#: Names that are not the user's, and what to do instead.
_RESERVED = {
    "CPU": "use --cpus-per-worker",
    "GPU": "use --gpus-per-worker",
    "memory": "use --memory",
    "object_store_memory": "Ray sets it itself",
}


@documented
@dataclass(frozen=True)
class Resources:
    """The workers of an analysis, and the resources each may use.

    A process that is already connected to a Ray uses it and ignores `address`. ``ray job submit``
    sets ``RAY_ADDRESS``. Data that do not fit into `memory` are streamed, and batches are made
    small enough; the model and vectors of its size always take memory.
    """

    workers: int | None = option(
        None, WORKERS, "Number of workers.", otherwise="one per GPU, else one per CPU core"
    )
    data_parallel: int = option(1, WORKERS, "Workers that share each gradient, as a team.")
    gpus_per_worker: float | None = option(
        None,
        WORKERS,
        "GPUs per worker; fractions share one.",
        otherwise="1 where the cluster has GPUs",
    )
    cpus_per_worker: float = option(1.0, WORKERS, "CPU cores per worker.")
    custom: Mapping[str, float] = option(
        {},
        WORKERS,
        "A custom resource of the cluster that each worker takes (repeatable).",
        flag="resource",
        metavar="NAME=AMOUNT",
    )
    threads: int | None = option(None, WORKERS, "Threads per worker.", otherwise="1")
    memory: float | None = option(
        None,
        WORKERS,
        "GiB per worker, of the GPU's memory where it has one.",
        otherwise="its share of four fifths of what is free",
        metavar="GIB",
    )
    patience: float | None = option(
        None,
        WORKERS,
        "Seconds without progress after which a worker is replaced.",
        otherwise="20 times what a step should take, at least 300",
        metavar="SECONDS",
    )
    local: bool | None = option(
        None,
        WORKERS,
        "Work in this process, without Ray; --no-local always starts workers.",
        otherwise="where all gradients take less time than starting workers",
    )
    address: str | None = option(
        None,
        "",
        "Ray cluster to use, HEAD:6379; local for a Ray of its own.",
        otherwise="RAY_ADDRESS, else local",
        metavar="HOST:PORT",
    )


@dataclass(frozen=True)
class Placement:
    """The workers of an analysis.

    Attributes:
        workers: how many, or how many teams.
        cpus: CPU cores per worker.
        gpus: GPUs per worker.
        custom: custom resources per worker, by name.
        memory: bytes per worker; None for a share of the free memory.
        sharers: number of workers that share the free memory of one node, or one GPU.
        team: workers that share a gradient.
    """

    workers: int
    cpus: float
    gpus: float
    custom: Mapping[str, float]
    memory: int | None
    sharers: int
    team: int = 1


def usable_cores() -> int:
    """CPU cores that this process may use: by its affinity, and the limits of its control groups.

    Taskset, Slurm and containers set these limits; the machine may have many more. At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = map(quota_of, control_groups("cpu"))
    return max(1, int(min([cores, *(quota for quota in quotas if quota is not None)])))


def quota_of(group: Path) -> float | None:
    """Cores' worth of time that a control group may take; None without a limit, or if not seen."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((group / name).read_text() for name in names).split()
            quota, period = map(float, words)
        except (OSError, ValueError):  # "max" included
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def only_on_ray(resources: Resources) -> dict[str, object]:
    """The options that were given of workers on Ray, by their names on the command line.

    GPUs, threads and memory are not among them: a process has those, too.
    """
    shared = ("gpus_per_worker", "threads", "memory", "local")
    defaults = Resources()
    return {
        flag_of(each): getattr(resources, each.name)
        for each in fields(Resources)
        if each.name not in shared
        if getattr(resources, each.name) != getattr(defaults, each.name)
    }


def place_workers(
    resources: Resources, nodes: Sequence[Mapping[str, float]], limit: int
) -> Placement:
    """Place workers on a cluster.

    Args:
        resources: the request.
        nodes: the resources of each node, ``CPU`` and ``GPU`` among them.
        limit: the most workers that can be kept busy.

    Raises:
        UsageError: if the cluster cannot meet the request.
    """
    check_resources(resources)
    gpus = resources.gpus_per_worker
    if gpus is None:
        own = resources.custom.items()
        there = [node for node in nodes if all(node.get(k, 0) >= v for k, v in own)]
        gpus = 1.0 if any(node.get("GPU", 0) for node in there) else 0.0
    needs = {"CPU": resources.cpus_per_worker, "GPU": gpus, **resources.custom}
    if not any(all(node.get(k, 0) >= v for k, v in needs.items() if v) for node in nodes):
        more = "".join(f" and {v:g} {k}" for k, v in resources.custom.items())
        raise UsageError(
            f"workers: no node has {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs{more}; ask for "
            "less"
        )
    rooms = [_room(node, needs) for node in nodes]
    count = min(_teams(resources, sum(rooms), any(needs.values())), max(1, limit))
    together = 1 / gpus if gpus else max(rooms)
    memory = None if resources.memory is None else int(resources.memory * 2**30)
    team = resources.data_parallel
    sharers = max(1, min(count * team, int(together)))
    return Placement(count, needs["CPU"], gpus, resources.custom, memory, sharers, team)


def _teams(resources: Resources, room: int, countable: bool) -> int:
    """The number of workers, or teams, that was asked for, or that fits into `room`."""
    team, workers = resources.data_parallel, resources.workers or max(1, room)
    if team == 1:
        return workers
    if not countable:
        raise UsageError(
            f"data-parallel {team}: workers that take no CPU, GPU or resource cannot be placed as "
            "teams; give --cpus-per-worker"
        )
    if room < team:
        raise UsageError(f"data-parallel {team}: only {room} workers fit; give a smaller number")
    if workers < team:
        raise UsageError(
            f"workers {workers}: fewer than the {team} of a team (--data-parallel); give more"
        )
    return workers // team


def check_resources(resources: Resources) -> None:
    """Refuse amounts that no machine has.

    Raises:
        UsageError: naming the option.
    """
    given = {name: getattr(resources, name) for name in ("cpus_per_worker", "gpus_per_worker")}
    given |= {f"resource {name}": value for name, value in resources.custom.items()}
    for name, value in given.items():
        if value is not None and not value >= 0:
            raise UsageError(f"{name.replace('_', '-')} {value}: must not be negative")
    reserved = sorted(_RESERVED.keys() & set(resources.custom))
    if reserved:
        raise UsageError(f"resource {reserved[0]!r}: is reserved; {_RESERVED[reserved[0]]}")
    if resources.memory is not None and not resources.memory > 0:
        raise UsageError(f"memory {resources.memory:g}: must be positive, in GiB")
    if resources.patience is not None and not resources.patience > 0:
        raise UsageError(f"patience {resources.patience:g}: must be positive, in seconds")
    if resources.threads is not None and resources.threads < 1:
        raise UsageError(f"threads {resources.threads}: must be at least 1")
    if resources.data_parallel < 1:
        raise UsageError(f"data-parallel {resources.data_parallel}: must be at least 1")
    if resources.workers is not None and resources.workers < 1:
        raise UsageError(f"workers {resources.workers}: must be at least 1")


def _room(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """The number of workers that fit on a node; 1 if they need nothing."""
    # With a small tolerance, since 0.3 / 0.1 < 3.
    fitting = [int(node.get(k, 0) / v + 1e-9) for k, v in needs.items() if v]
    return min(fitting, default=1)
