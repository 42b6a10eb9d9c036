"""Packaging a task's code for a cluster: the task's module or package, and what it imports.

Only files in the task's own folder are packaged; installed packages must be installed there, too.
Checkpoints, outputs, hidden files and virtual environments are never packaged.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from lcray.errors import TaskError, UsageError
from lcray.storage.files import ANALYSIS, RUN
from lcray.tasks.task import locate

MAX_BYTES = 64 * 2**20  # Ray's job server takes less than 100 MiB; code is much smaller
CHECKPOINTS = ("*.safetensors", "*.safetensors.index.json", "*.pt", "*.pth", "*.ckpt")
LEFT_OUT = (*CHECKPOINTS, "*.parquet", "*.pyc", "__pycache__", ".*")


@dataclass(frozen=True)
class Package:
    """A task's code.

    Attributes:
        reference: of the task, as seen from inside the package.
        files: path on this machine of each file, by its path in the package.
    """

    reference: str
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes in total."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def parts(self) -> list[str]:
        """The names at the top of the package, folders with a slash."""
        return sorted({"".join(name.partition("/")[:2]) for name in self.files})

    def __str__(self) -> str:
        parts = ", ".join(self.parts) or "no code: the task is installed"
        return f"{parts} ({len(self.files)} files, {self.size / 1024:.0f} KiB)"

    def write(self, folder: Path) -> None:
        """Copy the files into `folder`."""
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def pack(task: str, *, include: Sequence[str] = (), never: Sequence[str] = ()) -> Package:
    """Find the code of a task, without running it.

    Args:
        task: ``package.module:attribute``, searched for like a Python import from the current
            folder, or ``path/file.py:attribute``.
        include: files and folders of the task's folder (or of the current one) to add, such as
            data that the code reads, or modules that it imports by a computed name.
        never: files and folders (the run and the output) that are always left out.

    Raises:
        UsageError: if a path in `include` is missing, or is in neither folder.
        TaskError: if the task's module is not found, or the package is too large.
    """
    reference = locate(task).reference
    name, _, attribute = reference.rpartition(":")
    if name.endswith(".py"):
        first: Path | None = Path(name)
        root = Path(name).parent
        if not Path(name).is_file():
            raise TaskError(f"task file {name}: not found")
        reference = f"{Path(name).name}:{attribute}"
    else:
        root, first = _find_module(name)
    # A task may be in the folder of its run: then checkpoints are left out by their names.
    barred = [os.path.realpath(each) for each in never]
    walk = _Walk(tuple(Path(each) for each in barred if not _holds(each, first)))
    files = _with_imports(root, first, walk) if first else {}
    for each in include:
        files |= _included(Path(each), root, walk)
    package = Package(reference, files)
    _check_size(package)
    return package


def _holds(folder: str, path: Path | None) -> bool:
    return path is not None and Path(os.path.realpath(path)).is_relative_to(folder)


def _find_module(name: str) -> tuple[Path, Path | None]:
    """The folder that a module is imported from, and its file or package; None if installed."""
    top = name.partition(".")[0]
    where = _place(PathFinder.find_spec(top, [str(Path.cwd()), *sys.path]) or _hooked(top))
    if where is None:
        raise TaskError(
            f"task module {name!r}: not found; run from its folder, or name it "
            "path/file.py:attribute"
        )
    if _is_installed(where) or top == "lcray":
        return Path.cwd(), None
    inside = where.joinpath(*name.split(".")[1:])
    if "." in name and not (inside.is_dir() or inside.with_suffix(".py").is_file()):
        raise TaskError(f"task module {name!r}: not found in {where}")
    return where.parent, where


def _hooked(name: str) -> ModuleSpec | None:
    """The place of a module installed in editable mode, which is found through an import hook."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _place(spec: ModuleSpec | None) -> Path | None:
    """The file of a module, or the folder of a package."""
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(os.path.abspath(next(iter(spec.submodule_search_locations))))
    return Path(os.path.abspath(spec.origin)) if spec.has_location and spec.origin else None


def _is_installed(path: Path) -> bool:
    """Whether a package manager put it there; a virtual environment may be in the task's folder."""
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())


def _with_imports(root: Path, first: Path, walk: _Walk) -> dict[str, Path]:
    """`first`, and every module and package in `root` that it imports, directly or indirectly."""
    files: dict[str, Path] = {}
    todo, seen = [first], {first}
    while todo:
        found = walk.files(todo.pop(), root)
        files |= found
        for name in sorted({name for path in found.values() for name in _imported(path)}):
            where = _place(PathFinder.find_spec(name, [str(root), *sys.path]))
            if where is None or where in seen or where.parent != root or name == "lcray":
                continue
            if not _is_installed(where):
                seen.add(where)
                todo.append(where)
    return files


def _imported(path: Path) -> Iterator[str]:
    """The first part of every absolute import in a file, also of imports inside functions."""
    if path.suffix != ".py":
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # the user's code warns when it runs
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # e.g. a template; broken code fails when it runs
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@dataclass(frozen=True)
class _Walk:
    """Lists files, and leaves out files that are never packaged.

    Attributes:
        never: real paths to leave out with everything in them.
    """

    never: tuple[Path, ...]

    def files(self, path: Path, root: Path) -> dict[str, Path]:
        """The files at `path`, which may be a file itself, by their path from `root`."""
        if path.is_file():
            if self._is_barred(path):
                return {}
            return {path.relative_to(root).as_posix(): path}
        found: dict[str, Path] = {}
        seen: set[str] = set()
        # Links are followed, as by Python's imports: a link to a folder above would never end.
        for folder, folders, names in os.walk(path, followlinks=True):
            here = Path(folder)
            if os.path.realpath(here) in seen or self._is_barred(here) or _is_no_code(here, names):
                folders.clear()
                continue
            seen.add(os.path.realpath(here))
            folders[:] = sorted(name for name in folders if not _is_left_out(name))
            kept = [here / name for name in sorted(names) if not _is_left_out(name)]
            found |= {
                file.relative_to(root).as_posix(): file
                for file in kept
                if file.is_file() and not self._is_barred(file)
            }
        return found

    def _is_barred(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(each) for each in self.never)


def _is_left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def _is_no_code(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder is a run, an output, or a virtual environment."""
    if RUN in names and any(fnmatch(n, p) for n in names for p in CHECKPOINTS):
        return True
    if ANALYSIS in names and ((folder / "shards").is_dir() or (folder / "tables").is_dir()):
        return True
    return "pyvenv.cfg" in names


def _included(path: Path, root: Path, walk: _Walk) -> dict[str, Path]:
    """The files at `path`, by their path from the task's folder if they are in it."""
    for folder in (Path.cwd(), root):
        whole = Path(os.path.normpath(folder / path))
        for base in (root, Path.cwd()):
            if whole.exists() and whole.is_relative_to(base):
                return walk.files(whole, base)
    raise UsageError(
        f"include {path}: not found in {root}; only what is in the folder of the task, or in the "
        "current one, can be packaged"
    )


def _check_size(package: Package) -> None:
    """Refuse a package that is too large to be code; Ray's own refusal names no file."""
    if package.size <= MAX_BYTES:
        return
    sizes = {name: path.stat().st_size for name, path in package.files.items()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
    shown = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
    raise TaskError(
        f"task code: {package.size / 2**20:.0f} MiB in {len(sizes)} files, but at most "
        f"{MAX_BYTES // 2**20} MiB are allowed; the largest: {shown}; put data where every node "
        "reads them, outside of the task's package"
    )
