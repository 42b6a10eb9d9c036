"""What docstrings, comments and pages name exists: modules, functions, columns, commands, files."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from repository import ROOT

from lcray.cli.app import app

CODE = sorted(ROOT.glob("lcray/**/*.py"))
TESTS = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py")])
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
)  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: Of other libraries, where docstrings name them.
FOREIGN = {"scipy", "torch", "transformers", "accelerator", "UserDict"}


def prose(path: Path) -> Iterator[str]:
    """A page as it is; of a module the docstrings and the comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _DOCUMENTED):
            yield ast.get_docstring(node, clean=False) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@cache
def exists(dotted: str) -> bool:
    """Whether ``lcray.…`` is a module, or what a module or class has."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for name in parts[n:]:
            if name in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@cache
def words() -> frozenset[str]:
    """Every name, and every word of a string that is no docstring, in the package."""
    known = {path.stem for path in CODE}
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        told = [node.body[0] for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
        docstrings = {id(line.value) for line in told if isinstance(line, ast.Expr)}
        for node in ast.walk(tree):
            constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if constant and id(node) not in docstrings:
                known |= set(re.findall(r"\w+", node.value))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                known.add(token.string)
    return frozenset(known)


def unknown_references(text: str) -> list[str]:
    """Modules and what they have, and commands, that are named and do not exist."""
    dotted = re.findall(r"(?<![\w/.-])lcray(?:\.[A-Za-z_]\w*)+", text)
    commands = re.findall(r"`lcray ([a-z][\w-]*)", text)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        commands += re.findall(r"^\s*(?:\$ )?lcray ([a-z][\w-]*)", block, re.MULTILINE)
    found = [name for name in dotted if not exists(name)]
    return found + [f"lcray {name}" for name in commands if name not in app.commands]


def unknown_words(text: str) -> list[str]:
    """What stands in single backticks and is a word of the package nowhere else."""
    names = re.findall(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", text)
    ours = [name for name in names if name.split(".")[0] not in FOREIGN]
    return [name for name in ours if not words().issuperset(name.split("."))]


def unknown_files(text: str) -> list[str]:
    """Files of the repository that are named and do not exist."""
    names = re.findall(r"(?<![\w/.-])((?:lcray|tests|docs|examples)/[\w/]+\.(?:py|md))", text)
    return [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", [*CODE, *TESTS, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.slow
def test_what_is_named_exists(path: Path) -> None:
    wrong = [name for text in prose(path) for name in unknown_references(text)]
    wrong += [name for text in prose(path) for name in unknown_files(text)]
    if path in CODE:
        wrong += [name for text in prose(path) for name in unknown_words(text)]
    assert wrong == []


def test_what_does_not_exist_is_found() -> None:
    text = """See `lcray.tables.reducing.merge.nonsense`, lcray.submitting,
    `lcray.planning.plan.Plan.windows`, and
    `lcray.planning.plan.Plan.window`; `lcray analyse` and ``lcray plan``; lcray/none.py."""
    expected = [
        "lcray.tables.reducing.merge.nonsense",
        "lcray.submitting",
        "lcray.planning.plan.Plan.windows",
    ]
    assert unknown_references(text) == [*expected, "lcray analyse"]
    assert unknown_references("```sh\nlcray observe OUT\nlcray plan RUN\n```") == ["lcray observe"]
    assert unknown_files(text) == ["lcray/none.py"]
    assert unknown_words("`lc_errror` of `layers`, by `scipy.stats`") == ["lc_errror"]
