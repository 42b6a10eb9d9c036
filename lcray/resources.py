"""What an analysis may use of a machine or a cluster, and how workers are placed on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lcray.errors import UsageError


@dataclass(frozen=True)
class Resources:
    """What an analysis may use.

    Attributes:
        workers: actors; None for one a GPU, or one a CPU core where there is no GPU.
        gpus_per_worker: GPUs each (fractions share one); None for 1 where the cluster has GPUs.
        cpus_per_worker: CPU cores each.
        threads: intra-op threads each; None for 1, or what the plan in use says.
        memory: GiB that a worker may use, of the GPU's memory where it has one; None for its share
            of four fifths of what is free. Data that do not fit are streamed, and the size of
            batches stays below it; models and vectors of their size are needed in any case.
        address: of the Ray cluster to use; None starts a Ray of its own on this machine, unless
            the process is connected to one or was started by ``ray job submit``.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    threads: int | None = None
    memory: float | None = None
    address: str | None = None


@dataclass(frozen=True)
class Placement:
    """The workers of an analysis.

    Attributes:
        workers: how many.
        cpus: CPU cores each.
        gpus: GPUs each.
        memory: bytes each may take; None for a share of what is free.
        sharers: workers that such a share is of: those that fit on one node, or one GPU.
    """

    workers: int
    cpus: float
    gpus: float
    memory: int | None
    sharers: int


def place_workers(
    resources: Resources, nodes: Sequence[Mapping[str, float]], limit: int
) -> Placement:
    """Place workers on a cluster.

    Args:
        resources: what was asked for.
        nodes: what each node has, ``CPU`` and ``GPU``.
        limit: the most workers that there is work for.

    Raises:
        UsageError: for what cannot be had.
    """
    for name in ("cpus_per_worker", "gpus_per_worker"):
        value = getattr(resources, name)
        if value is not None and not value >= 0:
            raise UsageError(f"{name.replace('_', '-')} {value}: must not be negative")
    if resources.memory is not None and not resources.memory > 0:
        raise UsageError(f"memory {resources.memory:g}: must be positive, in GiB")
    if resources.workers is not None and resources.workers < 1:
        raise UsageError(f"workers {resources.workers}: must be at least 1")
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    needs = {"CPU": resources.cpus_per_worker, "GPU": gpus}
    if not any(all(node.get(k, 0) >= v for k, v in needs.items() if v) for node in nodes):
        raise UsageError(
            f"workers: no node has {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs; ask for less"
        )
    room = [_fitting(sum(node.get(k, 0) for node in nodes), v) for k, v in needs.items() if v]
    count = min(resources.workers or max(1, min(room, default=1)), max(1, limit))
    together = (
        1 / gpus if gpus else _fitting(max(node.get("CPU", 0) for node in nodes), needs["CPU"])
    )
    memory = None if resources.memory is None else int(resources.memory * 2**30)
    return Placement(count, needs["CPU"], gpus, memory, max(1, min(count, int(together))))


def _fitting(there: float, each: float) -> int:
    return int(there / max(each, 1e-9))
