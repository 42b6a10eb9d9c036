"""The names at the top, imported when first used; and the switch that forbids skips."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import scenes
from repository import TESTS

import lcray


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env=scenes.python_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_costs_nothing() -> None:
    heavy = {"torch", "ray", "pandas", "pyarrow", "duckdb", "scipy", "numpy", "rich", "click"}
    loaded = python("import lcray, sys; lcray.__version__; dir(lcray); print(*sys.modules)").split()
    assert heavy.isdisjoint(loaded)
    assert "lcray" in loaded


def test_a_driver_is_small() -> None:
    """Ray is loaded once workers start, modules that read and fit tables where they are used."""
    loaded = python("import lcray.execution.driver.analyze, sys; print(*sys.modules)").split()
    assert "torch" in loaded
    assert {"ray", "pandas", "duckdb", "scipy"}.isdisjoint(loaded)


@pytest.mark.parametrize("name", ["Recorder", "Task", "allocate"])
@pytest.mark.slow
def test_the_training_side_needs_no_ray(name: str) -> None:
    loaded = python(f"import lcray, sys; lcray.{name}; print(*sys.modules)").split()
    assert "torch" in loaded
    assert {"ray", "duckdb"}.isdisjoint(loaded)


def test_every_public_name_is_what_it_says() -> None:
    expected = {
        "LcrayError", "Recorder", "Resources", "Results", "Task", "allocate", "analyze", "demo",
        "inspect", "open", "plan", "query", "reduce", "status", "submit", "verify",
    }  # fmt: skip
    assert expected <= set(lcray.__all__) <= set(dir(lcray))
    for name in lcray.__all__:
        found = getattr(lcray, name)
        assert callable(found)
        assert found.__doc__
        assert found.__name__ in (name, f"{name}_output")
        assert found.__module__.startswith("lcray.")
    assert set(dir(lcray)) == {*lcray.__all__, "__version__"}


@pytest.mark.slow
def test_only_public_names_are_listed_whatever_is_imported() -> None:
    code = (
        "import lcray.plots, lcray.figures, lcray.execution.driver.analyze; print(*dir(lcray.{}))"
    )
    for name in ("plots", "figures"):
        module = importlib.import_module(f"lcray.{name}")
        assert python(code.format(name)).split() == sorted(module.__all__)
    modules = "lcray.plots, lcray.execution.driver.analyze, lcray.tables.reading.results"
    code = f"import {modules}; print(*dir(lcray))"
    assert python(code).split() == sorted([*lcray.__all__, "__version__"])


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'lcray' has no attribute 'analyse'"):
        lcray.analyse  # noqa: B018
    assert not hasattr(lcray, "nothing")


@pytest.mark.slow
def test_a_star_import_is_whole() -> None:
    assert python("from lcray import *; print(open.__module__, plan.__name__)") == (
        "lcray.tables.reading.results plan"
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "shared"])
@pytest.mark.parametrize(
    ("set_to", "code"), [("1", pytest.ExitCode.TESTS_FAILED), ("", pytest.ExitCode.OK)]
)
def test_skips_are_failures_where_they_are_forbidden(
    set_to: str, code: pytest.ExitCode, workers: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(
        "from conftest_of_lcray import pytest_sessionfinish, pytest_terminal_summary\n"
    )
    source = TESTS / "conftest.py"
    (tmp_path / "conftest_of_lcray.py").write_text(source.read_text())
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_skipped(): pytest.skip('no accelerator')\n"
        "@pytest.mark.xfail\n"
        "def test_expected(): assert False\n"
    )
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('nobody_has_it')\n")
    path = f"{TESTS}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env=scenes.python_environment() | {"LCRAY_NO_SKIPS": set_to, "PYTHONPATH": path},
    )
    assert done.returncode == code, done.stdout
    assert ("test_some.py::test_skipped: " in done.stdout) == bool(set_to)
    assert ("no accelerator" in done.stdout) == bool(set_to)
    assert ("could not import 'nobody_has_it'" in done.stdout) == bool(set_to)
