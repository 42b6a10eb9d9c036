"""Connecting to Ray: to an existing one, or to lcray's own."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.exceptions import RayError

from lcray.errors import ClusterError, UsageError
from lcray.execution.cluster import private
from lcray.execution.cluster.resources import Resources, usable_cores
from lcray.execution.worker.process import environment, worker_environment

_OBJECT_STORE = 128 * 2**20  # bytes; it carries only plans, unless there are teams


class Address(NamedTuple):
    """Where an analysis finds its Ray.

    Attributes:
        text: ``local`` for a Ray of its own.
        origin: the environment variable with the address, if it comes from one.
    """

    text: str
    origin: str = ""

    @classmethod
    def of(cls, resources: Resources) -> Address:
        """The requested address.

        Raises:
            UsageError: for the address of a dashboard.
        """
        given, said = resources.address, os.environ.get("RAY_ADDRESS")
        found = cls(given) if given else cls(said, "RAY_ADDRESS") if said else cls("local")
        if re.match(r"https?://", found.text):
            raise UsageError(
                f"{found.origin or 'address'} {found.text!r}: is a dashboard's address, which "
                f"takes jobs (lcray submit --address); here "
                + ("unset it for a Ray of lcray's own, or " if found.origin else "")
                + "give HEAD:6379, the head's own address"
            )
        return found

    @property
    def is_own(self) -> bool:
        """Whether the analysis starts its own Ray."""
        return self.text == "local"

    def __str__(self) -> str:
        if self.is_own:
            return "Ray on this machine"
        return f"Ray at {self.text!r}" + (f" ({self.origin})" if self.origin else "")

    def failed(self, why: str) -> ClusterError:
        """The error if Ray cannot be reached or started."""
        if self.is_own:
            return ClusterError(
                f"{self}: could not be started ({why}); is the machine short of memory, of "
                "processes or of room for temporary files?"
            )
        return ClusterError(f"{self}: cannot be reached ({why}); is the cluster up?")


@contextmanager
def connection(resources: Resources, prepared: Path | None = None) -> Iterator[None]:
    """Connect to an existing Ray, or start lcray's own, which ends with the block.

    Args:
        resources: the resources to use.
        prepared: the folder of lcray's own Ray, if this process was started with its
            `own_variables`; None to make a folder that is removed after the block.

    Raises:
        UsageError: for an address of another kind.
        ClusterError: if the cluster cannot be reached, or Ray fails in the block.
    """
    if ray.is_initialized():
        with _plainly():
            yield
        return
    address = Address.of(resources)
    handler = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        variables: dict[str, str] = {}
        if address.is_own and prepared is None:
            prepared = private.make_folder()
            stack.callback(private.remove, prepared)
            variables = own_variables(resources, prepared)
        try:
            with environment(variables):
                _start(address, resources, prepared)
        except Exception as error:  # Ray raises many kinds, plain Exception among them
            raise address.failed(in_one_line(error)) from error
        try:
            # Ray installs its own SIGTERM handler, which aborts; restore the earlier handler.
            if callable(handler) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            with _plainly():
                yield
        finally:
            if address.is_own:
                _end_autoscaler()
            ray.shutdown()


def _start(address: Address, resources: Resources, folder: Path | None) -> None:
    options: dict[str, Any] = {"address": address.text, "log_to_driver": False}
    options["logging_level"] = logging.ERROR
    if not address.is_own:
        _check_reachable(address.text)
        ray.init(**options)
        return
    assert folder is not None
    options |= {"include_dashboard": False, "num_cpus": usable_cores()}
    options["_temp_dir"] = private.temporary(folder)
    if resources.data_parallel == 1:
        options["object_store_memory"] = _OBJECT_STORE
    with _on_loopback():
        ray.init(**options)


def own_variables(resources: Resources, folder: Path) -> dict[str, str]:
    """Environment variables for the processes of lcray's own Ray, its workers among them.

    In a runtime environment of the actors, they would make Ray start new processes.

    Args:
        resources: the resources to use.
        folder: the private folder.
    """
    import torch  # processes started with these variables do not need it

    on_gpus = resources.gpus_per_worker != 0 and torch.cuda.device_count() > 0
    device = "cuda" if on_gpus else "cpu"
    return worker_environment(device, resources.threads or 1) | private.variables(folder)


@contextmanager
def _plainly() -> Iterator[None]:
    """Turn errors of Ray itself in the block into one line."""
    try:
        yield
    except RayError as error:
        raise ClusterError(
            f"Ray: failed ({in_one_line(error)}); run the same command again to continue"
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in the block listens on 127.0.0.1 alone, not on every interface.

    Ray has one switch for this, meant for systems whose firewall would ask, and reads it on import.
    This process tells the address to Ray's other processes.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _end_autoscaler() -> None:
    """End the autoscaler of lcray's own Ray, which has nothing to scale.

    It ignores the signal of Ray's shutdown, and would delay the shutdown by a second.
    """
    node = getattr(ray_worker, "_global_node", None)
    end: Any = getattr(node, "kill_monitor", None)  # not public: a Ray without it ends by itself
    if end is not None:
        end(check_alive=False)


def _check_reachable(address: str) -> None:
    """Raise an OSError if nobody listens at ``host:port``: Ray would end the process."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def in_one_line(error: BaseException | None) -> str:
    """The kind of an error and the last line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"
