"""The README is true: its recipes run on the demo, its tables and commands exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pandas as pd
import pytest
from repository import DOCS, ROOT

import lcray
from lcray.cli.app import app
from lcray.tables.schema import TABLES

README = (ROOT / "README.md").read_text()
QUERIES = (DOCS / "queries.md").read_text()
RECIPES = QUERIES.split("## Ten questions")[1].split("\n## ")[0]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    pytest.importorskip("sklearn", reason="scikit-learn is missing: the demo needs lcray[demo]")
    return lcray.demo(tmp_path_factory.mktemp("demo") / "lcray-demo", workers=2).path


@pytest.mark.ray
@pytest.mark.slow
def test_recipes_give_rows(demo_out: Path) -> None:
    blocks = python_blocks(RECIPES)
    assert len(blocks) == 10
    for block in blocks:
        names = {"lcray": lcray, "out": lcray.open(demo_out)}
        *statements, last = ast.parse(block).body
        if not isinstance(last, ast.Expr):
            raise AssertionError(f"a recipe ends in what it shows: {block}")
        exec(compile(ast.Module(statements, []), "README", "exec"), names)
        shown = eval(compile(ast.Expression(last.value), "README", "eval"), names)
        hurting = "HAVING" in block  # the demo may have no layer that hurts in total
        assert isinstance(shown, pd.DataFrame | pd.Series)
        assert len(shown) or hurting, block


@pytest.mark.ray
def test_the_transcript_is_what_the_demo_finds(demo_out: Path) -> None:
    """Within what another machine's rounding does to a hundred steps of training."""
    shown = re.search(r"<!-- demo -->\n```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    rows = {line.split()[0]: line.split()[1:] for line in shown[1].splitlines() if line.strip()}
    layers = lcray.open(demo_out).layers()
    train = layers[layers["split"] == "train"].groupby("layer", observed=True)["lc"].sum()
    for name, lc in train.items():
        assert float(rows[str(name)][1]) == pytest.approx(lc, abs=0.02)
    assert float(rows["train"][1]) == pytest.approx(train.sum(), abs=0.02)


def test_tables_are_named() -> None:
    section = README.split("## Tables")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(named) == sorted(set(TABLES) - {"borders"})


def test_commands_and_options_exist() -> None:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = set(re.findall(r"(?:^|--|`) *\\?\n? *lcray (\w+)", blocks, re.MULTILINE))
    commands |= set(re.findall(r"`lcray (\w+)", README))
    options = {
        o
        for command in app.commands.values()
        for p in command.params
        for o in (*p.opts, *p.secondary_opts)
    }
    flags = {flag for flag in re.findall(r"`(--[a-z-]+)[ `]", README) if flag != "--index-url"}
    assert {"analyze", "inspect", "plan", "query", "verify"} <= commands <= set(app.commands)
    assert flags <= options


def test_python_blocks_parse() -> None:
    for block in python_blocks(README):
        assert ast.parse(block).body
