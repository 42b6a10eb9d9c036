"""The verb `submit`: package the task's code, submit the analysis to a cluster, follow it."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Unpack

from lcray.errors import UsageError, suggest
from lcray.execution.cluster import jobs
from lcray.execution.cluster.resources import Resources
from lcray.planning.make import make_settings
from lcray.planning.saved import PathLike, load_plan
from lcray.settings import PlanOptions, Settings, flag_of
from lcray.storage import Remote, place
from lcray.tasks.packaging import Package, pack

_PLAN = "lcray-plan.json"  # in the package
_FLAGS = {each.name: flag_of(each) for each in (*fields(Settings), *fields(Resources))}
#: The keywords of `analyze` that are not settings, with their defaults.
_COURSE = {"steps": None, "span_length": None, "repair": False, "follow": False, "idle": None}


@dataclass(frozen=True)
class Submission:
    """A job on a cluster.

    Attributes:
        job: Ray's id of the job.
        address: the address of the job server.
        exit_code: the exit code of ``lcray analyze``, 0 if it succeeded; None if it was not waited
            for.
        message: why it failed, in one line.
    """

    job: str
    address: str
    exit_code: int | None = None
    message: str = ""


class JobOptions(PlanOptions, total=False):
    """The options of a job.

    Attributes:
        repair: as for `lcray.analyze`, like `follow` and `idle`.
        on_package: called with the package, before it is sent.
        on_submit: called once the cluster has the job.
        on_log: called with each new piece of the job's log, while the job is waited for.
    """

    repair: bool
    follow: bool
    idle: float | None
    on_package: Callable[[Package], None] | None
    on_submit: Callable[[Submission], None] | None
    on_log: Callable[[str], None] | None


def submit(
    run: str,
    task: str,
    out: str,
    *,
    address: str | None = None,
    plan: PathLike | None = None,
    resources: Resources | None = None,
    include: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    wait: bool = True,
    **options: Unpack[JobOptions],
) -> Submission:
    """Have a Ray cluster run ``lcray analyze``, and wait for it.

    The task's code is sent with the job and not imported here. Run and output are not sent: they
    must be on storage that every node can access.

    Args:
        run: the run: a URI, or an absolute path as the cluster sees it.
        task: ``package.module:attribute`` or ``path/file.py:attribute``.
        out: the output: a URI, or an absolute path as the cluster sees it.
        address: the cluster's job server, ``http://HEAD:8265``; by default
            ``RAY_API_SERVER_ADDRESS``, else port 8265 of this machine.
        plan: the file of a plan, instead of `lcray.plan`'s options.
        resources: workers, and what each may use.
        include: further files and folders that the task's code needs.
        env: variables for the job and its workers. Anyone who can see the job can read them: no
            secrets.
        wait: follow the job until it ends.
        **options: those of `lcray.analyze`; and three callbacks: ``on_package`` gets the package
            before it is sent, ``on_submit`` the submitted job, ``on_log`` each piece of its log.

    Raises:
        UsageError: for arguments that cannot be used.
        TaskError: if the task's code is not found, or too large.
        ClusterError: if the job server is not reached, or refuses.
        KeyboardInterrupt: as usual; a submitted job continues, and the message says how to follow
            and how to stop it.
    """
    on_package = options.pop("on_package", None) or _ignore
    on_submit = options.pop("on_submit", None) or _ignore
    on_log = options.pop("on_log", None) or _ignore
    if not isinstance(task, str):
        raise UsageError("task: name it package.module:attribute, so that its code can be sent")
    _check_place("run", run)
    _check_place("out", out)
    if plan is not None:
        load_plan(plan)
    resources = resources or Resources()
    if resources.address is not None:
        raise UsageError("resources.address: a job joins its own cluster; pass address=http://…")
    package = pack(task, include=include, never=[each for each in (run, out) if "://" not in each])
    given = ["--plan", _PLAN] if plan is not None else []
    command = ["lcray", "analyze", run, "--task", package.reference, "--out", out, *given]
    command += arguments(options, resources)
    on_package(package)
    client = jobs.connect(address)
    job = _send(client, package, plan, command, dict(env or {}))
    submitted = Submission(job, client.address)
    on_submit(submitted)
    if not wait:
        return submitted
    ended = jobs.follow(client, job, on_log)
    return Submission(job, client.address, ended.exit_code, ended.message)


def _ignore(told: object) -> None:
    """Ignore the event."""


def _send(
    client: Any, package: Package, plan: PathLike | None, command: list[str], env: dict[str, str]
) -> str:
    """Submit the command with its code and plan; Ray's id of the job."""
    with tempfile.TemporaryDirectory(prefix="lcray-") as folder:
        package.write(Path(folder))
        if plan is not None:
            Path(folder, _PLAN).write_bytes(Path(plan).read_bytes())
        return jobs.submit(client, shlex.join(command), folder, env)


def _check_place(what: str, text: str) -> None:
    """Refuse a path that would differ on the cluster, and credentials.

    Raises:
        UsageError: saying what to give instead.
    """
    if isinstance(place(text), Remote) or "://" in text:
        return
    if not os.path.isabs(text):
        raise UsageError(
            f"{what} {text!r}: is relative, and a job runs in a folder of its own; give the path "
            f"that every node sees (here it would be {os.path.abspath(text)}), or a URI"
        )


def arguments(options: Mapping[str, Any], resources: Resources) -> list[str]:
    """The arguments of ``lcray analyze`` for these options of `lcray.analyze`.

    Raises:
        UsageError: for an option that does not exist or cannot be used.
    """
    known = {field.name: field.default for field in fields(Settings)}
    valid = known | _COURSE
    for name in options:
        if name not in valid:
            raise UsageError(suggest(name, valid, "option"))
    make_settings({name: value for name, value in options.items() if name in known})
    placed = {field.name: field.default for field in fields(Resources)}
    values = {name: getattr(resources, name) for name in placed} | dict(options)
    defaults = placed | valid
    changed = [(name, value) for name, value in values.items() if value != defaults[name]]
    return [word for name, value in changed for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    flag = _FLAGS.get(name, name.replace("_", "-"))
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, Mapping):
        value = [f"{key}={amount}" for key, amount in value.items()]
    several = value if isinstance(value, list | tuple) else [value]
    return [word for each in several for word in (f"--{flag}", str(each))]
