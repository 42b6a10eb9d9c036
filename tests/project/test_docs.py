"""The site is true: its reference is made from the code, its examples run, it needs no network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scenes
import test_readme
from click.testing import CliRunner
from repository import DOCS, ROOT

import lcray
from lcray.analyses.registry import FINDINGS
from lcray.cli.app import app
from lcray.settings import Settings
from lcray.tables.schema import TABLES


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lcray_docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(page: str) -> dict[str, str]:
    """The text of each second heading."""
    _, *parts = re.split(r"^## ", page, flags=re.MULTILINE)
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}


def rows(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_column_of_every_table_is_there(hooks: ModuleType) -> None:
    found = sections(hooks.tables_page())
    assert set(found) == set(TABLES) - {"borders"}
    for name, text in found.items():
        schema = TABLES[name].schema
        assert rows(text) == schema.names
        for field in schema:
            assert field.metadata[b"description"].decode().replace("|", "\\|") in text


def test_every_column_of_every_finding_is_there(hooks: ModuleType, plain_out: Path) -> None:
    found = sections(hooks.findings_page())
    assert list(found) == [finding.name for finding in FINDINGS]
    # What a computed finding has is what the page says, without looking at its schema.
    computed = lcray.findings(_copy(plain_out), only=["shares", "layer_totals", "first_order"])
    for name, table in computed.items():
        assert rows(found[name]) == table.column_names


def _copy(out: Path) -> Path:
    import shutil

    target = out.parent / "findings-of-docs"
    return Path(shutil.copytree(out, target, dirs_exist_ok=True))


def test_every_public_name_is_there(hooks: ModuleType) -> None:
    page = hooks.api_page()
    assert re.findall(r"heading: lcray\.(\w+)", page) == lcray.__all__
    for target in re.findall(r"^::: (\S+)$", page, re.MULTILINE):
        module, _, name = target.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__


def test_every_field_of_resources_is_there(hooks: ModuleType) -> None:
    text = hooks.api_page().partition("heading: lcray.Resources")[2].partition("\n:::")[0]
    assert rows(text) == [each.name for each in fields(lcray.Resources)]


def test_every_command_and_option_is_there(hooks: ModuleType) -> None:
    found = sections(hooks.cli_page())
    assert set(found) == {"lcray", *(f"lcray {name}" for name in app.commands)}
    for name, command in app.commands.items():
        for param in command.params:
            for flag in param.opts:
                assert not flag.startswith("-") or flag in found[f"lcray {name}"], (name, flag)


def test_the_page_of_settings_has_them_all_as_their_fields_say(hooks: ModuleType) -> None:
    text = sections((DOCS / "settings.md").read_text())["Every setting"]
    assert rows(text) == [each.name for each in fields(Settings)]
    assert text.strip().endswith(hooks.options_table(Settings))


def test_every_command_teaches_by_an_example() -> None:
    for name, command in app.commands.items():
        lines = [line.split() for line in (command.epilog or "").splitlines()]
        examples = [words for words in lines if words[:1] == ["lcray"]]
        assert examples and all(words[1] == name for words in examples), name


def test_commands_and_options_that_pages_name_exist() -> None:
    options = {
        o
        for command in app.commands.values()
        for p in command.params
        for o in (*p.opts, *p.secondary_opts)
    }
    foreign = {"--generate", "--scale", "--page"}  # options of other programs
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
        commands = set(re.findall(r"^lcray (\w+)", blocks, re.MULTILINE))
        commands |= set(re.findall(r"`lcray ([a-z]\w*)", text))
        assert commands <= set(app.commands), path.name
        own = "\n".join(line for line in text.splitlines() if "ray start" not in line)
        flags = set(re.findall(r"`(--[a-z-]+)[ `=]", own)) - foreign
        assert flags <= options, path.name


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one to work in, whose modules are forgotten afterwards."""
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in ("mynet", "mytask"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_tutorial_from_top_to_bottom(folder: Path) -> None:
    """Files are written, Python runs in one namespace, commands run as they stand."""
    pytest.importorskip("sklearn", reason="scikit-learn is missing: the demo needs lcray[demo]")
    names: dict[str, Any] = {}
    ran = []
    for language, block in blocks((DOCS / "tutorial.md").read_text()):
        file = re.match(r"# (\w+\.py)\n", block)
        if file:
            (folder / file[1]).write_text(block)
        elif language == "python":
            exec(compile(block, "tutorial", "exec"), names)
        else:
            ran += [run(line, folder) for line in block.splitlines()]
    assert [word for word in ran if word != "python"] == [
        "demo", "query", "inspect", "plan", "analyze", "verify", "findings",
    ]  # fmt: skip
    assert lcray.verify(folder / "out" / "mine").ok
    change = lcray.open(folder / "out" / "mine").intervals().groupby("split", observed=True)
    assert (change["loss_change"].sum() < -1).all()  # it learns


def run(line: str, folder: Path) -> str:
    """Runs a command of a page; returns what it was."""
    program, *arguments = shlex.split(line)
    if program == "python":
        environment = scenes.python_environment()
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=100)
        return program
    assert program == "lcray", line
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, (line, done.output)
    return arguments[0]


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_no_network(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(\S+?)[\"\s>]", text)
        loaded += re.findall(r"<link[^>]*\shref=\"?(\S+?)[\"\s>]", text)
        assert [each for each in loaded if re.match(r"(https?:)?//", each)] == [], page
        # mermaid is the one thing that the theme would fetch, where a page has a diagram of it.
        assert 'class="mermaid"' not in text
    assert not [
        p for p in tmp_path.rglob("*.css") if re.search(r"url\([\"']?https?:", p.read_text())
    ]
    assert "lcray.Recorder" in (tmp_path / "reference" / "api.html").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_the_notebook_from_top_to_bottom(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: install lcray[dev]")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: install lcray[dev]")
    lcray.demo(tmp_path / "lcray-demo", workers=2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = ROOT / "examples" / "tour.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if not cell.source.startswith("import"))


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


def test_the_recipes_are_those_of_the_readme_test() -> None:
    assert len(test_readme.python_blocks(test_readme.RECIPES)) == 10


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("README.md", "Σ `elements` is"),  # of layers of kind parameter, buffers left out
        ("README.md", "group·(outputs per group) + j"),
        ("README.md", "not what would have happened without a layer"),
        ("README.md", "the variable `RAY_ADDRESS`"),
        ("docs/cluster.md", "by the variable `RAY_ADDRESS`"),
        ("docs/performance.md", "but wrong: loss changes are off by 0.2 to 0.6 %"),
        ("docs/performance.md", "bfloat16: 1.35 to 1.5 times as fast on a CPU"),
    ],
)
def test_what_numbers_and_settings_mean_is_said(page: str, words: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert words in text
