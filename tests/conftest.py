"""What several test files share: a tiny task and a recorded run of it, and one local Ray."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import object_server
import pytest
import scenes
from console import Lcray, Ran, exit_code
from hypothesis import HealthCheck, settings

import lcray
from lcray.tasks.task import Task

# A busy machine is no defect: nothing is timed in tests.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of the real data sets."""
    folder = os.environ.get("LCRAY_DATA", "")
    if not folder:
        pytest.skip("LCRAY_DATA is unset: it names the folder of the data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The Ray that all tests share: four workers fit, whatever the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        resources={"slot": 2},
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server on loopback that all tests share."""
    with object_server.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, private_cache: Path) -> Iterator[str]:
    """An empty bucket of it, as ``s3://name``, and the environment to reach it."""
    name = f"lcray-{uuid.uuid4().hex[:12]}"
    object_server.client(s3_endpoint).create_bucket(Bucket=name)
    with object_server.using(s3_endpoint):
        yield f"s3://{name}"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test sees what another has fetched."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache") / "objects"
        patch.setenv("LCRAY_CACHE", str(folder))
        yield folder


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Analyses take place in this process, without Ray."""
    scenes.work_inline(monkeypatch)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `scenes.plain`: steps 0 to 12. Read only."""
    return scenes.record(scenes.plain, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="session")
def plain_out(plain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed analysis of it, in spans of three intervals, without Ray. Read only."""
    out = tmp_path_factory.mktemp("plain-out") / "out"
    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        lcray.analyze(plain_run, "scenes:plain", out, **scenes.OPTIONS)
    return out


@pytest.fixture
def run(plain_run: Path, tmp_path: Path) -> Path:
    """A copy of the plain run, to damage."""
    return Path(shutil.copytree(plain_run, tmp_path / "run"))


@pytest.fixture
def out(plain_out: Path, tmp_path: Path) -> Path:
    """A copy of its analysis in spans of three intervals."""
    return Path(shutil.copytree(plain_out, tmp_path / "out"))


@pytest.fixture
def plain_task() -> Task:
    """That of the plain run, its splits at hand: 17 samples in `train`, 6 in `val`."""
    return replace(scenes.plain, splits=scenes.points())


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lcray:
    """Runs ``lcray ARGUMENTS``."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        return Ran(exit_code(*arguments), *capfd.readouterr())

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where LCRAY_NO_SKIPS is set, a test that was skipped is a failure, named at the end."""
    if os.environ.get("LCRAY_NO_SKIPS") and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = _skipped(terminalreporter.config) if os.environ.get("LCRAY_NO_SKIPS") else []
    if skipped:
        terminalreporter.section("LCRAY_NO_SKIPS is set, but tests were skipped", red=True)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.line(f"{report.nodeid}: {reason}")


def _skipped(config: pytest.Config) -> list[pytest.TestReport | pytest.CollectReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    # `make gpu` is for who has a GPU: nothing else depends on one.
    found = [report for report in reports if not report.nodeid.startswith("tests/gpu/")]
    return [report for report in found if not hasattr(report, "wasxfail")]
