"""What an analysis may use of a machine or a cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What an analysis may use.

    Attributes:
        workers: actors; None for one a GPU, or one a CPU core where there is no GPU.
        gpus_per_worker: GPUs each (fractions share one); None for 1 where the cluster has GPUs.
        cpus_per_worker: CPU cores each.
        threads: intra-op threads each; None for 1, or what the plan in use says.
        address: of the Ray cluster to use; None starts a Ray of its own on this machine, unless
            the process is connected to one or was started by ``ray job submit``.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1.0
    threads: int | None = None
    address: str | None = None
