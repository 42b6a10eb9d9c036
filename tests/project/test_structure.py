"""The rules that keep the package liveable, checked on its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import planting
import pytest
from repository import PACKAGE

import lcray

FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400  # lines; modules are around 150
LONGEST_FUNCTION = 60  # lines of body
MOST_ARGUMENTS = 9

#: The rooms; each imports only from those before it.
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
#: What is in a room, likewise: modules that are not named come first, the face of a room last.
INNER = {
    "tables": ("shards", "writing", "reading", "reducing", "verifying"),
    "execution": ("worker", "in_memory", "cluster", "local", "driver"),
    "figures": ("data", "matplotlib", "html", "exports"),
    "tasks": ("model", "data"),
}
#: Rooms that know nothing of one another, whatever their order.
STRANGERS = ({"figures", "execution"},)
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
#: What stands at the top of the package: rooms, and a few files.
TOP = {name.split(".")[1] for name in TREES if "." in name}


def speaks(name: str) -> bool:
    """The command line does; everything else is a library and keeps quiet."""
    return name.split(".")[1:2] in (["cli"], ["__main__"])


def edges() -> dict[str, set[str]]:
    """Module to the modules that it imports; `lcray` itself and lazy faces left out."""
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


def place(name: str) -> tuple[int, int]:
    """Where a module stands: its room's number, and its own in the room."""
    _, room, *rest = name.split(".")
    inner = ("", *INNER.get(room, ()))
    within = rest[0] if rest and rest[0] in inner else ""
    return ORDER.index(room), inner.index(within) if rest or room not in INNER else len(inner)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in edges().items()
        for target in targets
        if place(target) > place(name)
    ]
    assert wrong == []


def test_some_rooms_do_not_know_each_other() -> None:
    pairs = {
        frozenset({name.split(".")[1], target.split(".")[1]})
        for name, targets in edges().items()
        for target in targets
    }
    assert pairs and pairs.isdisjoint(map(frozenset, STRANGERS))


def test_every_room_within_a_room_is_there() -> None:
    for room, inner in INNER.items():
        assert {f"lcray.{room}.{each}" for each in inner} <= set(TREES)


def test_nothing_private_is_imported() -> None:
    found = [
        f"{name}:{node.lineno} {alias.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lcray")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert found == []


def test_opening_an_output_loads_neither_torch_nor_ray_nor_scipy() -> None:
    heavy = ("torch", "ray", "scipy", "pandas", "duckdb")
    code = f"import sys, lcray.tables.reading.results; print(*{{*sys.modules}} & {{*{heavy}}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planting.picture(tmp_path_factory.mktemp("structure") / "out")


HEAVY = ("torch", "ray", "scipy", "scipy.signal", "scipy.stats", "matplotlib", "duckdb", "rich")
#: Commands that answer at once, and what of the above they cannot do without.
AT_ONCE = {
    "query {out}": {"rich"},
    "query {out} --format csv": set(),
    "query {out} SELECT\tlayer,sum(lc)\tFROM\tlayers\tGROUP\tBY\tALL": {"rich", "duckdb"},
    "query {out} SELECT\t1 --format json": {"duckdb"},
    "status {out}": {"rich"},
    "status {out} --json": set(),
    "export {out} --to csv --out {folder}": set(),
    "report {out}": {"duckdb", "scipy", "scipy.signal", "scipy.stats"},
    "findings {out} --only shares --json": {"scipy", "rich"},
}


@pytest.mark.parametrize("command", AT_ONCE)
def test_commands_that_answer_at_once_load_little(
    command: str, output: Path, tmp_path: Path
) -> None:
    code = """
import sys
from lcray.cli.app import app
app(sys.argv[2:], standalone_mode=False)
print(*{*sys.modules} & {*sys.argv[1].split()}, file=sys.stderr)
"""
    words = [word.replace("\t", " ") for word in command.split(" ")]
    words = [word.format(out=output, folder=tmp_path) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", code, " ".join(HEAVY), *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {*done.stderr.splitlines()[-1].split()} <= AT_ONCE[command]


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


@pytest.mark.parametrize("name", sorted(name for name in TREES if not speaks(name)))
def test_the_library_does_not_print(name: str) -> None:
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if ast.unparse(call.func) == "print"] == []


def test_only_the_command_line_imports_what_speaks() -> None:
    users = {name for name, targets in edges().items() if any(map(speaks, targets))}
    assert users and all(map(speaks, users))


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


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def test_functions_stay_short() -> None:
    long = []
    for name, node in functions():
        first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
        if (node.body[-1].end_lineno or 0) - first.lineno >= LONGEST_FUNCTION:
            long.append(name)
    assert long == []


def test_functions_take_few_arguments() -> None:
    """Beside options; what belongs together comes as one object."""
    assert [
        name
        for name, node in functions()
        if node.name != "__init__"
        if len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) > MOST_ARGUMENTS
    ] == []
