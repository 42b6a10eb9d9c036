"""Reaching a Ray: the one there is, or one's own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.exceptions import RayError

from lcray.errors import ClusterError
from lcray.process import environment, worker_environment
from lcray.resources import Resources

_OBJECT_STORE = 128 * 2**20  # bytes; nothing but plans goes through it, unless there are teams


@contextmanager
def connection(resources: Resources) -> Iterator[None]:
    """A Ray to work on: the one there is, or one's own, which ends with the block.

    Raises:
        ClusterError: if the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = resources.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    options["logging_level"] = logging.ERROR
    if address == "local":
        options["include_dashboard"] = False
        if resources.data_parallel == 1:
            options["object_store_memory"] = _OBJECT_STORE
    handler = signal.getsignal(signal.SIGTERM)
    on_gpus = resources.gpus_per_worker != 0 and torch.cuda.device_count() > 0
    variables = worker_environment("cuda" if on_gpus else "cpu", resources.threads or 1)
    try:
        _check_reachable(address)
        # In a runtime environment of the actors they would cost Ray a start of processes anew.
        if address == "local":
            with environment(variables), _on_loopback():
                ray.init(**options)
        else:
            ray.init(**options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"Ray at {address!r}: cannot be reached ({in_one_line(error)}); is the cluster up?"
        ) from error
    try:
        # Ray takes SIGTERM for itself, and would abort; a handler that was there comes back.
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        if address == "local":
            _end_autoscaler()
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in the block listens on 127.0.0.1 alone, not on every interface.

    Ray has one switch for that, meant for systems whose firewall would ask, and has read it when it
    was imported. Its other processes are told the address by this one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _end_autoscaler() -> None:
    """End the autoscaler of a Ray of one's own, which has nothing to scale.

    It does not heed the signal that Ray's shutdown sends, and so takes a second of it.
    """
    node = getattr(ray_worker, "_global_node", None)
    end: Any = getattr(node, "kill_monitor", None)  # not public: a Ray without it ends by itself
    if end is not None:
        end(check_alive=False)


def _check_reachable(address: str) -> None:
    """Raise an OSError where nobody listens at ``host:port``: Ray would end the process."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def in_one_line(error: BaseException | None) -> str:
    """The kind of an error and the last line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}"
