"""What is built and installed: the wheel, the source distribution, and an empty environment."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

import lcray


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both, built without a network: the backend is installed."""
    pytest.importorskip("build", reason="build is missing: install lcray[dev]")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tracked(folder: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = {name for name in names if ".dist-info/" in name}
        points = next(archive.read(n).decode() for n in about if n.endswith("entry_points.txt"))
        metadata = next(archive.read(n).decode() for n in about if n.endswith("METADATA"))
    assert names - about == tracked("lcray")  # every template and table, too
    assert "lcray/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in about)
    assert "lcray = lcray.cli.app:main" in points
    assert f"Version: {lcray.__version__}" in metadata
    assert "Provides-Extra: demo" in metadata


@pytest.mark.slow
def test_the_source_distribution_can_be_built_from(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert tracked("lcray") | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith((".venv", "site/", "lcray-demo"))]
