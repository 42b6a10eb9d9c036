"""The rules that keep the package liveable, checked on its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lcray

PACKAGE = Path(lcray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400  # lines; modules are around 150

#: Each module imports only from those before it.
ORDER = (
    "errors",
    "settings",
    "storage",
    "checkpoints",
    "tasks",
    "allocation",
    "planning",
    "statistics",
    "tables",
    "analyses",
    "figures",
    "execution",
    "integrations",
    "plots",
    "digits",
    "cli",
    "__main__",
)
#: The command line; everything else is a library and keeps quiet.
SPEAKS = {
    "lcray.__main__",
    "lcray.cli.app",
    "lcray.cli.compare",
    "lcray.cli.convert",
    "lcray.cli.display",
    "lcray.cli.export",
    "lcray.cli.findings",
    "lcray.cli.options",
    "lcray.cli.progress",
    "lcray.cli.query",
    "lcray.cli.report",
    "lcray.cli.submit",
    "lcray.cli.terminal",
    "lcray.cli.trace",
}
#: What `lcray convert` reads with; without trust it unpickles nothing (tests/converting).
CONVERTER = "lcray.checkpoints.convert.opening"
NO_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported name with its line; `from a import b` gives ``a.b`` as well as ``a``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not set(names) <= MODULES:  # else only modules of the package are wanted
                yield node.module or "", node.lineno
            yield from ((name, node.lineno) for name in names)


MODULES = {module_name(path) for path in FILES}
TREES = {module_name(path): ast.parse(path.read_text()) for path in FILES}
TOP = {name.split(".")[1] for name in TREES if "." in name}


def edges() -> dict[str, set[str]]:
    """Module to the modules that it imports, `lcray` itself (which imports lazily) left out."""
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        if name != "lcray":
            found = {target for target, _ in imports(tree) if target in TREES}
            graph[name] = found - {name, "lcray"}
    return graph


def test_the_graph_is_read_at_all() -> None:
    assert "lcray.errors" in edges()["lcray.tasks.task"]
    assert "lcray.checkpoints.series" in edges()["lcray.checkpoints.recording"]


def test_imports_have_no_cycle() -> None:
    # A package imports its modules, so an import of the package from inside would be a cycle too.
    assert list(TopologicalSorter(edges()).static_order())


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(TOP - set(ORDER)) == []
    assert len(set(ORDER)) == len(ORDER)


def test_imports_point_one_way() -> None:
    wrong = []
    for name, targets in edges().items():
        here = name.split(".")[1]
        for target in targets:
            there = target.split(".")[1]
            if here != there and ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_the_package_imports_nothing_of_its_own_at_import() -> None:
    top_level = [node for node in TREES["lcray"].body if isinstance(node, ast.Import)]
    assert top_level == []
    lazy = [node for node in TREES["lcray"].body if isinstance(node, ast.ImportFrom)]
    assert all(not (node.module or "").startswith("lcray") for node in lazy)


def test_ray_is_imported_in_one_package() -> None:
    users = {
        name
        for name, tree in TREES.items()
        for target, _ in imports(tree)
        if target == "ray" or target.startswith("ray.")
    }
    assert users and all(name.startswith("lcray.execution.cluster") for name in users)


@pytest.mark.parametrize("name", TREES)
def test_nothing_pickles(name: str) -> None:
    tree = TREES[name]
    found = [f"{t}:{line}" for t, line in imports(tree) if t.split(".")[0] in NO_PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
            if name == CONVERTER:  # says of each call whether it may unpickle
                assert "weights_only" in {keyword.arg for keyword in node.keywords}
                continue
            found.append(f"{ast.unparse(node.func)}:{node.lineno}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"allow_pickle:{node.value.lineno}")
    assert found == []


@pytest.mark.parametrize("name", sorted(set(TREES) - SPEAKS))
def test_the_library_does_not_print(name: str) -> None:
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if ast.unparse(call.func) == "print"] == []


def test_only_the_command_line_imports_what_speaks() -> None:
    users = {name for name, targets in edges().items() if targets & SPEAKS}
    assert users <= SPEAKS


def test_no_module_bears_the_name_of_a_public_function() -> None:
    public = {name for name in lcray.__all__ if callable(getattr(lcray, name))}
    assert public, "the package has public names"
    assert sorted(public & TOP) == []


@pytest.mark.parametrize("name", lcray.__all__)
def test_public_names_exist_and_say_what_they_are(name: str) -> None:
    assert (getattr(lcray, name).__doc__ or "").strip()


def test_modules_stay_small() -> None:
    lines = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in FILES}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
