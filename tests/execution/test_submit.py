"""What is submitted: the command, the refusals before it, and how a job's end is read.

The job server itself is in `test_on_a_cluster`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

import lcray
from lcray.cli import app
from lcray.errors import ClusterError, LcrayError, UsageError
from lcray.execution.cluster import jobs
from lcray.execution.cluster.resources import Resources
from lcray.execution.driver.submit import arguments
from lcray.settings import Settings
from lcray.tables.reading.results import open_output

TASK = "from lcray import Task\nimport mynet\n"
SUCCEEDED = jobs.Ended(0, "")
ADDRESS = "http://127.0.0.1:8265"


@dataclass
class Server:
    """Takes the place of the job server: keeps what it gets, and ends jobs as it is told."""

    ended: jobs.Ended = SUCCEEDED
    log: tuple[str, ...] = ()
    commands: list[list[str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def connect(self, address: str | None) -> jobs.Client:
        return jobs.Client(None, address or ADDRESS)

    def submit(self, client: jobs.Client, command: str, folder: str, env: dict[str, str]) -> str:
        self.commands.append(shlex.split(command))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        self.files = {str(path.relative_to(folder)): path.read_text() for path in paths}
        self.env = env
        return "raysubmit_1"

    def follow(self, client: jobs.Client, job: str, on_log: Any) -> jobs.Ended:
        for text in self.log:
            on_log(text)
        return self.ended


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A job server, and a current folder with a task."""
    made = Server()
    for name in ("connect", "submit", "follow"):
        monkeypatch.setattr(jobs, name, getattr(made, name))
    (tmp_path / "mytask.py").write_text(TASK)
    (tmp_path / "mynet.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return made


def run_cli(*words: object) -> int:
    """The exit code of ``lcray WORDS``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lcray", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            app.main()
            sys.exit(0)
    return int(left.value.code or 0)


def parsed(words: list[str]) -> dict[str, Any]:
    """What ``lcray analyze`` understands."""
    assert words[:2] == ["lcray", "analyze"]
    return app.analyze.make_context("analyze", words[2:]).params


VALUES: dict[type[click.ParamType], list[str]] = {
    type(click.INT): ["3"],
    type(click.FLOAT): ["0.25"],
    type(click.STRING): ["one two;$(x)'"],
}
SPECIAL = {
    "rule": "gauss*2",
    "batch_norm": "batch",
    "fisher_kind": "empirical",
    "dtype": "float64",
    "memory_format": "contiguous",
    "trace": "0.weight:1",
    "custom": "slot=0.5",
}


def every_option() -> Iterator[list[str]]:
    """An example of every option that analyze takes and a job may have."""
    for option in app.analyze.params:
        if not isinstance(option, click.Option) or option.name in (
            "task", "out", "address", "as_json", "saved",
        ):  # fmt: skip
            continue
        if option.is_flag:
            yield from ([flag] for flag in (*option.opts, *option.secondary_opts))
        else:
            value = SPECIAL.get(option.name or "") or VALUES[type(option.type)][0]
            second = "disk=2" if option.name == "custom" else "0.bias:2"
            yield [option.opts[0], value, *([option.opts[0], second] * option.multiple)]


@pytest.mark.parametrize("option", list(every_option()), ids=lambda option: option[0])
def test_the_job_gets_every_option_of_analyze(option: list[str], server: Server) -> None:
    given = ["/shared/run", "--task", "mytask:task", "--out", "s3://bucket/a/out"]
    expected = parsed(["lcray", "analyze", *given, *option])
    assert run_cli("submit", *given, *option) == 0
    # Defaults are left to the lcray on the cluster, so that a difference is what was asked for.
    defaults = asdict(Settings()) | asdict(Resources())
    found = parsed(server.commands[0])
    for name, value in expected.items():
        assert found[name] == value or (found[name] is None and value == defaults[name]), name


def test_paths_and_uris_pass_as_they_are(server: Server) -> None:
    for run, out in [("/a b/run", "/c/./out"), ("s3://bucket/a b/run", "gs://bucket/out")]:
        found = lcray.submit(run, "mytask:task", out)
        assert (found.job, found.exit_code, found.address) == ("raysubmit_1", 0, ADDRESS)
        words = server.commands.pop()
        assert words == ["lcray", "analyze", run, "--task", "mytask:task", "--out", out]


def test_code_plan_and_environment_travel(server: Server, plain_out: Path, tmp_path: Path) -> None:
    record = json.loads((plain_out / "analysis.json").read_text())
    plan = tmp_path / "my plan.json"
    plan.write_text(json.dumps({k: record[k] for k in ("format_version", "plan")}))
    assert open_output(plain_out).path  # a real one
    (tmp_path / "extra.csv").write_text("1")
    lcray.submit(
        "/run", "mytask:task", "/out", plan=plan, include=["extra.csv"], env={"A": "b"},
        resources=Resources(workers=2, cpus_per_worker=1.0),
    )  # fmt: skip
    assert server.files == {
        "mytask.py": TASK,
        "mynet.py": "",
        "extra.csv": "1",
        "lcray-plan.json": plan.read_text(),
    }
    assert server.env == {"A": "b"}
    assert server.commands[0][-4:] == ["--plan", "lcray-plan.json", "--workers", "2"]


def test_run_and_output_stay_where_they_are(server: Server, tmp_path: Path) -> None:
    for name in ("__init__.py", "task.py", "run/a.json", "out/b.json"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("")
    lcray.submit(f"{tmp_path}/mine/run", "mine.task:task", f"{tmp_path}/mine/out")
    assert set(server.files) == {"mine/__init__.py", "mine/task.py"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "runs/mine"}, r"run 'runs/mine': is relative, .* \(here it would be /.*/runs/m"),
        ({"out": "out"}, "out 'out': is relative"),
        (
            {"out": "s3://key:secret@bucket/out"},
            "s3://bucket/out: addresses are recorded and must not contain",
        ),
        ({"rule": "simson"}, "unknown rule 'simson': did you mean 'simpson'"),
        ({"reul": "simpson"}, "unknown option 'reul': did you mean 'rule'"),
        ({"on_progress": print}, "unknown option 'on_progress'"),
        ({"plan": "mytask.py"}, "mytask.py"),
        ({"task": lcray.Task(dict, {}, max)}, "task: name it package.module:attribute"),
        ({"task": "missing:task"}, "task module 'missing': not found"),
        ({"resources": Resources(address="auto")}, "resources.address: a job joins its own"),
    ],
)
def test_refused_before_anything_is_sent(
    change: dict[str, Any], message: str, server: Server
) -> None:
    given = {"run": "/run", "task": "mytask:task", "out": "/out"} | change
    with pytest.raises(LcrayError, match=message) as raised:
        lcray.submit(**given)
    assert "secret" not in str(raised.value)
    assert server.commands == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "A"], "lcray: env 'A': must have the form NAME=VALUE"),
        (["--env", "1=2"], "lcray: env '1=2': must have the form NAME=VALUE"),
        (["--out", "relative"], "lcray: out 'relative': is relative"),
    ],
)
def test_usage_errors(
    words: list[str], message: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("submit", "/run", "--task", "mytask:task", "--out", "/out", *words) == 2
    assert capsys.readouterr().err.startswith(message)


def test_what_the_command_shows(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["submit", "/run", "--task", "mytask:task", "--out", "/out", "--env", "A=b=c"]
    server.log = ("one\ntw", "o\n")
    assert run_cli(*command) == 0
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n"
    assert shown.err.splitlines() == [
        "lcray: sending mynet.py, mytask.py (2 files, 0 KiB)",
        "lcray: submitted raysubmit_1",
    ]
    assert server.env == {"A": "b=c"}
    server.ended = jobs.Ended(3, "failed with exit code 3")
    assert run_cli(*command) == 3
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "lcray: job raysubmit_1 failed with exit code 3"
    server.log = ()
    assert run_cli(*command, "--no-wait") == 0
    assert capsys.readouterr().out == "raysubmit_1\n"


RUNTIME = "Traceback (most recent call last):\n  File x\nValueError: no such package\n"


@pytest.mark.parametrize(
    ("status", "message", "code", "expected"),
    [
        ("SUCCEEDED", "Job finished successfully.", 0, (0, "")),
        ("FAILED", "Job entrypoint command failed with exit code 2, last", 2, (2, "exit code 2")),
        # Servers before Ray 2.5 told it in the message alone; its log may speak of others.
        ("FAILED", "command failed with exit code 3, last\nexit code 9", None, (3, "exit code 3")),
        ("FAILED", "command failed with exit code -9.", None, (137, "exit code 137")),
        ("FAILED", None, -15, (143, "exit code 143")),
        ("FAILED", None, 127, (127, "is lcray[cluster] on the PATH")),
        ("FAILED", RUNTIME, None, (1, "did not run: .*ValueError: no such package")),
        ("FAILED", None, None, (1, "did not run")),
        ("FAILED", None, 0, (1, "failed")),  # contradicts itself: not a success
        ("STOPPED", "", None, (1, "was stopped")),
    ],
)
def test_how_a_job_ended(
    status: str, message: str | None, code: int | None, expected: tuple[int, str]
) -> None:
    found = jobs.how_it_ended(status, message, code)
    assert found.exit_code == expected[0]
    pattern = expected[1].replace("[", r"\[")
    assert re.search(pattern, found.message) and "\n" not in found.message


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://u:p@head:8265", "x"])
def test_addresses_of_another_kind(address: str) -> None:
    with pytest.raises(UsageError, match=r"must be the job server's, http://HEAD:8265"):
        jobs.connect(address)


def test_the_address_that_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client would prefer the variables."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(ClusterError, match=r"^http://127.0.0.1:3: ConnectionError: .*:3\.;"):
        jobs.connect("http://127.0.0.1:3/")
    with pytest.raises(ClusterError, match=r"^http://127.0.0.1:2: ConnectionError: .*:2\.;"):
        jobs.connect(None)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lcray\[cluster\]'"):
        jobs.connect(ADDRESS)


def test_defaults_are_not_repeated() -> None:
    assert arguments({}, Resources()) == []
    assert arguments({"rule": "simpson", "trace": (), "parameters": None}, Resources()) == []
    assert arguments({"deterministic": False, "splits": ["a", "b"]}, Resources(threads=2)) == [
        "--threads", "2", "--no-deterministic", "--split", "a", "--split", "b",
    ]  # fmt: skip


class Jobs:
    """A client of Ray's whose connection breaks after every piece of the log."""

    def __init__(self, pieces: list[str], breaks: list[Exception]) -> None:
        self.pieces, self.breaks = pieces, breaks

    async def tail_job_logs(self, job: str) -> Any:
        count = len(self.pieces) - len(self.breaks)
        yield "".join(self.pieces[:count])
        if self.breaks:
            raise self.breaks.pop()

    def get_job_info(self, job: str) -> Any:
        return type("Details", (), {"status": "FAILED", "message": "", "driver_exit_code": 5})

    def get_job_logs(self, job: str) -> str:
        return "".join(self.pieces) + "the end\n"


def test_a_log_is_passed_on_once_however_often_the_connection_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import aiohttp

    monkeypatch.setattr(jobs, "_POLL", 0.0)
    breaks = [RuntimeError("closed"), aiohttp.ServerDisconnectedError(), OSError("reset")]
    client = jobs.Client(Jobs(["a\n", "b\n", "c\n", "d\n"], breaks), ADDRESS)
    seen: list[str] = []
    assert jobs.follow(client, "raysubmit_1", seen.append).exit_code == 5
    assert "".join(seen) == "a\nb\nc\nd\nthe end\n"
    assert breaks == []
