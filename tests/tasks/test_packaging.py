"""What of a task travels to a cluster: real folders, and a Python that imports what was packed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scenes

from lcray.errors import TaskError, UsageError
from lcray.tasks.packaging import MAX_BYTES, Package, pack

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Makes files, ``name="text"``, in a project folder and goes there."""

    def make(files: dict[str, str]) -> Path:
        root = tmp_path / "project"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        monkeypatch.chdir(root)
        return root

    return make


TASK = "import numpy, os\nfrom mynet import build\ntask = build\n"


def names(package: Package) -> list[str]:
    return sorted(package.files)


def test_a_module_and_the_siblings_that_it_imports(tree: Tree) -> None:
    root = tree(
        {
            "mytask.py": TASK,
            "mynet.py": "def build():\n    import late\n    from deep import x\n",
            "late.py": "",
            "deep.py": "try:\n    import optional_of_mine\nexcept ImportError:\n    x = 1\n",
            "optional_of_mine.py": "import mytask\n",  # a cycle
            "unrelated.py": "",
            "notes.txt": "",
        }
    )
    package = pack("mytask:task")
    expected = ["deep.py", "late.py", "mynet.py", "mytask.py", "optional_of_mine.py"]
    assert names(package) == expected
    assert package.reference == "mytask:task"
    assert package.size == sum((root / name).stat().st_size for name in expected)


def test_a_file_from_elsewhere(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree({"lib/mytask.py": TASK, "lib/mynet.py": "", "mynet.py": "wrong"})
    package = pack("lib/mytask.py:task")
    assert package.reference == "mytask.py:task"
    assert package.files == {n: root / "lib" / n for n in ("mynet.py", "mytask.py")}
    monkeypatch.chdir("/")
    assert pack(f"{root}/lib/mytask.py:task") == package


def test_nested_packages_travel_whole(tree: Tree) -> None:
    tree(
        {
            "mine/__init__.py": "",
            "mine/tasks/__init__.py": "",
            "mine/tasks/digits.py": "from .. import nets\nfrom mine.nets.small import build\n",
            "mine/nets/__init__.py": "",
            "mine/nets/small.py": "import shared\n",
            "mine/nets/sizes.json": "{}",
            "mine/broken_template.py": "{{ not Python }}",
            "shared/part.py": "import helper\n",  # without __init__: a namespace package
            "helper.py": "",
            "other/__init__.py": "",
        }
    )
    package = pack("mine.tasks.digits:task")
    assert package.parts == ["helper.py", "mine/", "shared/"]
    assert "mine/nets/sizes.json" in names(package)
    assert "mine/broken_template.py" in names(package)
    with pytest.raises(TaskError, match=r"task module 'mine.tasks.letters': not found in .*mine"):
        pack("mine.tasks.letters:task")


def test_what_is_packed_is_what_python_needs(tree: Tree, tmp_path: Path) -> None:
    """A process that sees nothing but the package imports the task."""
    tree(
        {
            "mytask.py": "import mine.net\nfrom single import value\ntask = mine.net.name + value",
            "mine/__init__.py": "",
            "mine/net.py": "import far\nname = far.name\n",
            "far.py": "name = 'a'\n",
            "single.py": "value = 'b'\n",
        }
    )
    pack("mytask:task").write(tmp_path / "there")
    done = subprocess.run(
        [sys.executable, "-c", "import mytask; print(mytask.task)"],
        cwd=tmp_path / "there",
        env=scenes.python_environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ab\n", done.stderr


def test_what_never_travels(tree: Tree) -> None:
    root = tree(
        {
            "mine/__init__.py": "",
            "mine/task.py": "",
            "mine/data.csv": "1",
            **{
                f"mine/{name}": "x"
                for name in (
                    "w.safetensors", "w.pt", "w.pth", "w.ckpt", "t.parquet", "old.pyc",
                    "model.safetensors.index.json", ".env", ".git/config",
                    "__pycache__/task.cpython-311.pyc", "venv/pyvenv.cfg", "venv/lib/x.py",
                    "run/run.json", "run/step-00000000.safetensors", "run/notes.py",
                    "out/analysis.json", "out/shards/0-1/commit.json", "out/tables/x.csv",
                )
            },
            "mine/config/run.json": "{}",  # not a run: there is no checkpoint beside it
            "mine/config/analysis.json": "{}",  # not an output: there are neither shards nor tables
        }
    )  # fmt: skip
    (root / "mine" / "loop").symlink_to(root / "mine")
    kept = ["__init__.py", "config/analysis.json", "config/run.json", "data.csv", "task.py"]
    assert names(pack("mine.task:task")) == [f"mine/{name}" for name in kept]


def test_run_and_output_never_travel(tree: Tree) -> None:
    """Whatever they are named, and whatever is in them."""
    root = tree(
        {"mine/__init__.py": "", "mine/a/x.json": "", "mine/b/y.csv": "", "mine/c/z.csv": ""}
    )
    (root / "link").symlink_to(root / "mine" / "b")
    package = pack("mine:task", never=[str(root / "mine" / "a"), str(root / "link")])
    assert names(package) == ["mine/__init__.py", "mine/c/z.csv"]
    package = pack("mine:task", include=["mine/a"], never=[str(root / "mine" / "a")])
    assert "mine/a/x.json" not in package.files


def test_a_task_in_the_folder_of_its_run(tree: Tree) -> None:
    root = tree({"mytask.py": TASK, "mynet.py": "", "step-1.safetensors": "", "run.json": ""})
    assert names(pack("mytask:task", never=[str(root)])) == ["mynet.py", "mytask.py"]


def test_too_large_names_what_is(tree: Tree) -> None:
    root = tree({"mine/__init__.py": "", "mine/small.csv": "1"})
    for name, size in {"images.npz": MAX_BYTES - 2**20, "labels.npz": 3 * 2**20}.items():
        with open(root / "mine" / name, "wb") as file:
            file.truncate(size)
    limit = MAX_BYTES // 2**20
    with pytest.raises(
        TaskError,
        match=rf"^task code: {limit + 2} MiB in 4 files, but at most {limit} MiB are allowed; the "
        rf"largest: mine/images.npz \({limit - 1} MiB\), mine/labels.npz \(3 MiB\), "
        r".*put data where",
    ):
        pack("mine:task")
    os.truncate(root / "mine" / "labels.npz", 2**20 - 1)
    assert pack("mine:task").size == MAX_BYTES


def test_what_is_included(tree: Tree) -> None:
    root = tree(
        {
            "lib/mytask.py": "",
            "lib/vocabulary.json": "{}",
            "lib/plugins/a.py": "",
            "lib/plugins/w.pt": "",
            "lib/given.pt": "",
            "data/x.csv": "",
        }
    )
    include = ["vocabulary.json", "lib/plugins", str(root / "lib" / "given.pt"), "data/x.csv"]
    package = pack("lib/mytask.py:task", include=include)
    # From the task's folder where it is in there; a file that is named is meant.
    expected = ["data/x.csv", "given.pt", "mytask.py", "plugins/a.py", "vocabulary.json"]
    assert names(package) == expected
    for path in ("missing.csv", "/etc/hostname"):
        with pytest.raises(UsageError, match=f"^include {path}: not found in .*lib"):
            pack("lib/mytask.py:task", include=[path])


def test_what_is_installed_stays_at_home(tree: Tree) -> None:
    tree({"numpy_of_mine.py": "", "wandb/latest/log.txt": "", "json/__init__.py": ""})
    package = pack("lcray.digits:task")
    assert (package.files, package.reference) == ({}, "lcray.digits:task")
    assert pack("pytest:task", include=["numpy_of_mine.py"]).parts == ["numpy_of_mine.py"]
    # As Python has it: the current folder comes before the standard library.
    assert pack("json:task").parts == ["json/"]


def test_installed_packages_win_over_folders_that_only_share_their_name(tree: Tree) -> None:
    tree({"mytask.py": "import pytest\n", "pytest/logs/x.py": ""})
    assert names(pack("mytask:task")) == ["mytask.py"]


def test_a_clone_of_lcray_stays_at_home(tree: Tree) -> None:
    """The cluster's nodes have one of their own, and workers must not mix the two."""
    tree({"mytask.py": "import lcray\n", "lcray/__init__.py": "", "lcray/tasks/task.py": ""})
    assert names(pack("mytask:task")) == ["mytask.py"]
    assert pack("lcray.tasks.task:task").files == {}


def test_a_module_from_the_search_path(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree({"lib/mytask.py": TASK, "lib/mynet.py": "", "work/x": ""})
    monkeypatch.chdir(root / "work")
    with pytest.raises(TaskError, match="task module 'mytask': not found; run from its folder"):
        pack("mytask:task")
    monkeypatch.syspath_prepend(root / "lib")
    assert names(pack("mytask:task")) == ["mynet.py", "mytask.py"]


def test_links_are_followed(tree: Tree) -> None:
    tree({"elsewhere/real.py": "import helper\n", "code/helper.py": ""})
    Path("code/mytask.py").symlink_to(Path("elsewhere/real.py").resolve())
    os.chdir("code")
    assert names(pack("mytask:task")) == ["helper.py", "mytask.py"]


def test_references_that_cannot_be_packed(tree: Tree) -> None:
    tree({"x.txt": ""})
    with pytest.raises(TaskError, match=r"task file .*mytask.py: not found"):
        pack("mytask.py:task")
    with pytest.raises(UsageError, match="must have the form package"):
        pack("mytask")


def test_how_it_is_shown(tree: Tree) -> None:
    tree({"mytask.py": "import mine\n" + "#" * 2036, "mine/__init__.py": ""})
    assert str(pack("mytask:task")) == "mine/, mytask.py (2 files, 2 KiB)"
    assert str(pack("lcray.digits:task")) == "no code: the task is installed (0 files, 0 KiB)"
