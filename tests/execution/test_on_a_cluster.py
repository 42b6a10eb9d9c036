"""Submission end to end: a real Ray head with its job server, tokens asked for, on loopback.

On a machine of its own (`loopback`), so that nothing listens where others could reach it.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
import scenes
from loopback import Machine
from repository import CLUSTER, TESTS

import lcray
from lcray.storage.files import FORMAT_VERSION
from lcray.tables.output import Output

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SERVER = "http://127.0.0.1:8265"
TOKENLESS = {"RAY_AUTH_MODE": None, "HOME": "/nonexistent"}
SLOW = """
import time
from mytask import splits, task as quick
from lcray import Task

def loss(model, batch):
    time.sleep(1)
    return quick.loss(model, batch)

task = Task(quick.model, splits, loss)
"""


def start_head(machine: Machine) -> None:
    """As the README says: a token, and RAY_AUTH_MODE=token in the shell that starts the head."""
    made = machine.run("ray", "get-auth-token", "--generate")
    assert made.returncode == 0, made.stderr
    # By default the workers' ports begin at 10002: the head's have to be below.
    head = machine.run(
        "ray", "start", "--head", "--port=6379", "--node-ip-address=127.0.0.1", "--num-cpus=2",
        "--dashboard-host=127.0.0.1", f"--temp-dir={machine.folder}/ray",
        "--object-store-memory=100000000",
    )  # fmt: skip
    assert head.returncode == 0, head.stderr


@pytest.fixture
def alone() -> Iterator[Machine]:
    """A machine where RAY_AUTH_MODE=token is set, as the README asks for."""
    with loopback.machine(RAY_AUTH_MODE="token") as made:
        yield made


@pytest.fixture(scope="module")
def head() -> Iterator[Machine]:
    """A machine with a Ray head, a run of the worked example, and ``slow.py``, a slow task."""
    with loopback.machine(RAY_AUTH_MODE="token") as made:
        start_head(made)
        train(made)
        (made.folder / "code").mkdir()
        for name, text in scenes.sources(CLUSTER / "code").items():
            (made.folder / "code" / name).write_text(text)
        (made.folder / "code" / "slow.py").write_text(SLOW)
        yield made


def train(machine: Machine) -> None:
    done = machine.run(
        "python", CLUSTER / "code" / "mytrain.py", "--run", machine.folder / "run", "--steps", 4
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def out(head: Machine) -> Path:
    """The output of the worked submission."""
    done = head.run(CLUSTER / "job.sh", head.folder / "run", head.folder / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lcray: intervals 4/4" in done.stdout
    return head.folder / "out"


@pytest.fixture(scope="module")
def plan(out: Path) -> Path:
    """The plan of it."""
    record = Output(out).existing()
    assert record is not None
    data = {"format_version": FORMAT_VERSION, "plan": record.plan.to_dict()}
    path = out.parent / "plan.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def local(head: Machine, plan: Path) -> dict[str, bytes]:
    """The tables of an analysis without a cluster, under that plan."""
    done = head.run(
        "lcray", "analyze", "../run", "--task", "mytask:task", "--out", "../local",
        "--plan", plan, "--workers", 1,
        cwd=head.folder / "code",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return scenes.tables(head.folder / "local")


def submit(head: Machine, out: str, *arguments: object, task: str = "mytask:task") -> list[str]:
    command = ["lcray", "submit", head.folder / "run", "--task", task, "--out", head.folder / out]
    return [*map(str, command), *map(str, arguments)]


def token(head: Machine) -> str:
    return (head.folder / "home" / ".ray" / "auth_token").read_text().strip()


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The last line on stderr; no token and no traceback is anywhere."""
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def test_the_worked_submission(out: Path, local: dict[str, bytes]) -> None:
    assert scenes.tables(out) == local
    assert lcray.verify(out).ok


def test_lcray_submit_gives_the_tables_of_a_local_analysis(
    head: Machine, plan: Path, local: dict[str, bytes]
) -> None:
    command = submit(head, "submitted", "--plan", plan, "--workers", 2)
    done = head.run(*command, cwd=head.folder / "code")
    assert done.returncode == 0, done.stdout + done.stderr
    sending, submitted = done.stderr.splitlines()
    assert sending.startswith("lcray: sending mynet.py, mytask.py (2 files")
    assert re.fullmatch(r"lcray: submitted raysubmit_\w+", submitted)
    lines = done.stdout.splitlines()
    assert "lcray: intervals 4/4" in lines
    assert f"tables: {head.folder}/submitted/tables/*.parquet" in lines
    assert scenes.tables(head.folder / "submitted") == local
    kept = scenes.commits(head.folder / "submitted")
    # The code is unpacked elsewhere, and found to be the same: nothing is computed again.
    again = head.run(*command[:4], f"{head.folder}/code/mytask.py:task", *command[5:])
    assert again.returncode == 0, again.stdout + again.stderr
    assert scenes.commits(head.folder / "submitted") == kept
    listed = head.run("ray", "job", "list", "--address", SERVER)
    assert listed.returncode == 0 and "raysubmit_" in listed.stdout
    assert token(head) not in done.stdout + done.stderr + listed.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "log", "error"),
    [
        # Ray's own command line would exit with 1 each time.
        (["--split", "trian"], 2, "did you mean 'train'?", "failed with exit code 2"),
        (["--steps", "99:"], 1, "lcray: ", "failed with exit code 1"),
        (["--env", "PATH=/usr/bin:/bin"], 127, "lcray: not found", r"PATH .* on every node\?"),
    ],
)
def test_a_failing_job_gives_its_exit_code(
    arguments: list[str], code: int, log: str, error: str, head: Machine
) -> None:
    done = head.run(*submit(head, "failing", *arguments), cwd=CLUSTER / "code")
    assert done.returncode == code, done.stdout + done.stderr
    assert log in done.stdout
    assert re.search(rf"^lcray: job raysubmit_\w+ .*{error}$", error_of(done))


@pytest.mark.parametrize(
    "env", [TOKENLESS, {"RAY_AUTH_TOKEN": "b" * 64}], ids=["no token", "another token"]
)
def test_a_submission_without_the_token(env: dict[str, str | None], head: Machine) -> None:
    done = head.run(*submit(head, "refused"), cwd=CLUSTER / "code", env=env)
    assert done.returncode == 1
    assert error_of(done).startswith(f"lcray: {SERVER}: refused the token, or there was none: ")
    assert "set RAY_AUTH_MODE=token" in error_of(done)
    assert token(head) not in done.stdout + done.stderr
    assert not (head.folder / "refused").exists()


def test_nobody_at_the_address(head: Machine) -> None:
    done = head.run(
        *submit(head, "nowhere", "--address", "http://127.0.0.1:9"), cwd=CLUSTER / "code"
    )
    assert done.returncode == 1
    assert error_of(done).startswith("lcray: http://127.0.0.1:9: ConnectionError: Failed to conn")


def test_a_job_that_nobody_waits_for(head: Machine) -> None:
    done = head.run(*submit(head, "later", "--split", "x", "--no-wait"), cwd=CLUSTER / "code")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    assert re.fullmatch(r"raysubmit_\w+", job)
    ended = follow(head, job)
    assert ended.stdout.splitlines()[-1] == "2 failed with exit code 2"
    assert "unknown split 'x'" in ended.stdout


def follow(head: Machine, job: str) -> subprocess.CompletedProcess[str]:
    return head.run(
        "python", "-c",
        "import sys\n"
        "from lcray.execution.cluster import jobs\n"
        f"client = jobs.connect('{SERVER}/')\n"
        f"print(*jobs.follow(client, '{job}', sys.stdout.write))",
    )  # fmt: skip


def test_ctrl_c_leaves_the_job_and_says_what_can_be_done(head: Machine) -> None:
    task = f"{head.folder}/code/slow.py:task"
    following = head.start(*submit(head, "slow", task=task), spaces=("net",))
    assert following.stdout is not None
    seen = next(line for line in following.stdout if line.startswith("lcray: starting workers"))
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130, (seen, err)
    last = err.splitlines()[-1]
    told = re.fullmatch(
        r"lcray: interrupted; job (raysubmit_\w+) goes on: follow it with `(ray job logs .*)`, "
        r"stop it with `(ray job stop .*)`",
        last,
    )
    assert told, err
    job, logs, stop = told.groups()
    status = head.run("ray", "job", "status", "--address", SERVER, job)
    assert "RUNNING" in status.stdout + status.stderr
    watching = head.start(*shlex.split(logs))
    stopped = head.run(*shlex.split(stop))
    assert stopped.returncode == 0, stopped.stderr
    log, _ = watching.communicate(timeout=60)
    assert "lcray: starting workers" in log
    assert follow(head, job).stdout.splitlines()[-1].endswith("was stopped")


def test_a_head_that_dies_is_out_of_sight(alone: Machine) -> None:
    start_head(alone)
    code = (
        "import os, subprocess, sys\n"
        "from lcray.execution.cluster import jobs\n"
        "from lcray.errors import ClusterError\n"
        "jobs._PATIENCE = 2\n"
        "client = jobs.connect(None)\n"
        "job = jobs.submit(client, 'echo here; sleep 100', sys.argv[1], {})\n"
        "seen = []\n"
        "def on_log(text):\n"
        "    seen.append(text)\n"
        "    if 'here\\n' in text:\n"
        "        subprocess.run(['ray', 'stop', '--force'], check=True)\n"
        "try:\n"
        "    jobs.follow(client, job, on_log)\n"
        "except ClusterError as error:\n"
        "    print(error)\n"
    )
    (alone.folder / "empty").mkdir()
    done = alone.run("python", "-c", code, alone.folder / "empty", timeout=120)
    assert re.search(r"job raysubmit_\w+: out of sight \(.*\); it may go on: follow", done.stdout)


def test_a_slurm_job(alone: Machine) -> None:
    """The script and Ray are real; SLURM's two programs are stand-ins for a job of one node."""
    train(alone)
    programs = alone.folder / "bin"
    programs.mkdir()
    for name, text in {"srun": 'exec "$@"', "scontrol": "echo 127.0.0.1"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    assert alone.run("ray", "get-auth-token", "--generate").returncode == 0
    done = alone.run(
        "bash", CLUSTER / "slurm.sh", alone.folder / "run", alone.folder / "out",
        env={
            "PATH": f"{programs}:{alone.environment['PATH']}",
            "SLURM_SUBMIT_DIR": str(CLUSTER),
            "SLURM_JOB_NODELIST": "here",
            "SLURM_JOB_NUM_NODES": "1",
            "RAY_TMPDIR": str(alone.folder / "ray"),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Starting Ray cluster head" in done.stdout
    assert lcray.verify(alone.folder / "out").ok


def test_ray_submit_over_ssh(alone: Machine) -> None:
    loopback.skip_without("sshd", "ssh", "rsync")
    train(alone)
    run, out = alone.folder / "run", alone.folder / "out"
    script = TESTS / "ssh" / "ray_submit.sh"
    done = alone.run("bash", script, alone.folder / "remote", run, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"tables: {out}/tables/*.parquet" in done.stdout
    assert "Accepted publickey" in (alone.folder / "remote" / "sshd.log").read_text()
    code = alone.folder / "remote" / "home" / "lcray-code"
    assert scenes.sources(code) == scenes.sources(CLUSTER / "code")
    assert lcray.verify(out).ok
