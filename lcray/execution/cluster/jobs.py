"""Ray's Jobs API: hand a command to a cluster's job server, and follow it to its exit code."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from ray.exceptions import AuthenticationError, RayError

from lcray.errors import ClusterError, UsageError
from lcray.execution.cluster.connect import in_one_line
from lcray.execution.worker.process import environment

LOCAL = "http://127.0.0.1:8265"  # where `ray start --head` puts the job server
_PATIENCE = 60.0  # seconds without an answer until contact with a job counts as lost
_POLL = 1.0  # seconds
_CHATTY = (  # loggers of Ray that report every upload and connection
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Client(NamedTuple):
    """A connection to a job server."""

    jobs: Any  # ray.job_submission.JobSubmissionClient
    address: str


class Ended(NamedTuple):
    """How a job ended: the exit code of its command, and why it failed, in one line."""

    exit_code: int
    message: str


def connect(address: str | None) -> Client:
    """A client of the job server at ``http://HEAD:8265``.

    Raises:
        UsageError: for an address of another kind, or if the necessary packages are missing.
        ClusterError: if nobody answers there, or a token is needed.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise UsageError("submitting jobs needs Ray's job client: pip install 'lcray[cluster]'")
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or LOCAL
    if not re.match(r"https?://[^@/]+/?$", address):
        raise UsageError(
            f"address {address!r}: must be the job server's, http://HEAD:8265, without credentials"
        )
    address = address.rstrip("/")
    # Ray's client prefers these variables to its argument; and RAY_ADDRESS names another server.
    with _answered(address), environment({"RAY_API_SERVER_ADDRESS": address}):
        return Client(JobSubmissionClient(address), address)


def submit(client: Client, command: str, working_dir: str, env: dict[str, str]) -> str:
    """Have the cluster run a shell command in a copy of `working_dir`; returns the job's id.

    Raises:
        ClusterError: if the job server refuses.
    """
    runtime_env: dict[str, Any] = {"working_dir": working_dir}
    if env:
        runtime_env["env_vars"] = env
    with _answered(client.address):
        return str(client.jobs.submit_job(entrypoint=command, runtime_env=runtime_env))


def follow(client: Client, job: str, on_log: Callable[[str], None]) -> Ended:
    """Pass on a job's log until it ends; a broken connection is made again.

    Raises:
        ClusterError: if the job server stays silent.
        KeyboardInterrupt: as usual, with advice about the job, which continues.
    """
    try:
        return _follow(client, job, on_log)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"job {job} goes on: {_hints(client, job)}") from None


def _follow(client: Client, job: str, on_log: Callable[[str], None]) -> Ended:
    passed = 0  # characters of the log
    heard = time.monotonic()
    while True:
        try:
            skip = passed
            for text in _tail(client, job):
                heard = time.monotonic()
                new, skip = text[skip:], max(0, skip - len(text))
                passed += len(new)
                if new:
                    on_log(new)
            details = client.jobs.get_job_info(job)
            heard = time.monotonic()
        except AuthenticationError as error:
            raise _refused(client.address) from error
        except (OSError, RuntimeError, RayError) as error:
            if time.monotonic() - heard > _PATIENCE:
                raise ClusterError(
                    f"job {job}: out of sight ({in_one_line(error)}); it may go on: "
                    f"{_hints(client, job)}"
                ) from error
        else:
            if details.status in _ENDED:
                _pass_rest(client, job, passed, on_log)
                return how_it_ended(details.status, details.message, details.driver_exit_code)
        time.sleep(_POLL)


def _pass_rest(client: Client, job: str, passed: int, on_log: Callable[[str], None]) -> None:
    """Pass on the end of a log that the follower may have missed while the job ended."""
    with suppress(OSError, RuntimeError, RayError):
        if rest := client.jobs.get_job_logs(job)[passed:]:
            on_log(rest)


def how_it_ended(status: str, message: str | None, exit_code: int | None) -> Ended:
    """The exit code of a job that has ended, wherever its version of Ray gives it.

    Args:
        status: ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        message: message of the status; older servers give the code only here.
        exit_code: exit code of the command; None if it never ran, was stopped, or the server is
            older.
    """
    if status == "SUCCEEDED":
        return Ended(0, "")
    if status == "STOPPED":
        return Ended(exit_code or 1, "was stopped")
    told = re.search(r"exit code (-?\d+)", message or "")
    if exit_code is None and told:
        exit_code = int(told[1])
    if exit_code is None:
        lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
        return Ended(1, f"did not run: {' '.join(lines[:1] + lines[1:][-1:])[:400]}")
    if exit_code < 0:  # killed by a signal: the code that a shell gives
        exit_code = 128 - exit_code
    hint = ""
    if exit_code == 127:
        hint = "; is lcray[cluster] on the PATH of the shell that started Ray, on every node?"
    return Ended(exit_code or 1, f"failed with exit code {exit_code}{hint}")


def _tail(client: Client, job: str) -> Iterator[str]:
    """The log from its beginning, as it grows, until the job ends or the connection does."""
    import aiohttp

    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()

    async def pump() -> None:
        try:
            async for text in client.jobs.tail_job_logs(job):
                pieces.put(text)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error

    loop = asyncio.new_event_loop()
    task = loop.create_task(pump())

    def work() -> None:
        try:
            loop.run_until_complete(task)
        except BaseException as error:
            pieces.put(error)
        else:
            pieces.put(None)
        finally:
            loop.close()

    # In a thread of its own, since a notebook's thread already has a running loop.
    thread = threading.Thread(target=work, name="lcray-job-log", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        if thread.is_alive() and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=5)


@contextmanager
def _answered(address: str) -> Iterator[None]:
    """Turn errors of the job server's client into one line."""
    try:
        yield
    except AuthenticationError as error:
        raise _refused(address) from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"{address}: {in_one_line(error)}; is this the address of the head's dashboard, and "
            "was ray[default] installed there?"
        ) from error


def _refused(address: str) -> ClusterError:
    return ClusterError(
        f"{address}: refused the token, or there was none: set RAY_AUTH_MODE=token, and the same "
        "token (RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token), in the shell that started the head and "
        "in the one that submits"
    )


def _hints(client: Client, job: str) -> str:
    to = f"--address {client.address} {job}"
    return f"follow it with `ray job logs --follow {to}`, stop it with `ray job stop {to}`"
