"""Every error that a newcomer can make with the tutorial: one line, what, where, what to do.

No traceback, and an exit code that is not 0. Commands run in this process, in a folder with a run,
its output and things that are neither.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scenes
import torch
from console import Lcray
from repository import PACKAGE
from safetensors.torch import load_file, save_file

import lcray
from lcray.storage.lock import locked

Outcome = Callable[..., tuple[int, str]]
EARLY = ("starting workers", "measuring a gradient", "intervals", "merging", "findings ")


@pytest.fixture
def outcome(command: Lcray) -> Outcome:
    """Runs ``lcray ARGUMENTS``; gives its exit code and the line that is not progress."""

    def run(*arguments: object) -> tuple[int, str]:
        ran = command(*arguments)
        own = [x for x in ran.err.splitlines() if not x.removeprefix("lcray: ").startswith(EARLY)]
        lines = own or ran.out.splitlines()[:1]  # what verify finds is its answer
        assert "Traceback" not in ran.out + ran.err
        assert len(own) <= 1, ran.err
        return ran.code, "\n".join(lines)

    return run


@pytest.fixture(scope="module")
def scene(plain_run: Path, plain_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of somebody who tries things. Read only."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(plain_run, folder / "run")
    shutil.copytree(plain_out, folder / "out")
    for name in ("empty", "half", "one", "pickled"):
        (folder / name).mkdir()
    shutil.copy(plain_out / "analysis.json", folder / "half")
    shutil.copy(scenes.checkpoint(plain_run, 0), folder / "one")
    torch.save({}, folder / "pickled" / "step_1.pt")
    (folder / "file.txt").write_text("x")
    (folder / "broken.py").write_text("x = 1 / 0\n")
    (folder / "half_written.py").write_text("def task(:\n")
    (folder / "imports.py").write_text("import module_of_somebody\n")
    (folder / "other").mkdir()
    for path in sorted((folder / "run").glob("*.safetensors")):
        tensors = load_file(path)
        save_file(
            {name: value + 1 for name, value in tensors.items()}, folder / "other" / path.name
        )
    return folder


RUNS = [
    ("nowhere", "nowhere: no such run; give the directory of checkpoints"),
    ("empty", "empty: no checkpoints; record some with lcray.Recorder"),
    ("file.txt", "file.txt: a run is a directory, and this is a file"),
    ("run/step-00000000.safetensors", "safetensors: a run is a directory, and this is a file"),
    (
        "pickled",
        "pickled: holds pickled checkpoints, which are never opened; convert them: lcray convert ",
    ),
    ("out", "out: is the output of an analysis; give the run that was analyzed"),
]
TASKS = [
    ("mytask:task", "task module 'mytask': cannot be imported: .*; run from its folder, or"),
    ("scenes:plian", "unknown attribute 'plian': did you mean 'plain'"),
    ("newcomers:no_task", "is a dict, must be a lcray.Task"),
    ("newcomers:mean", r"needs arguments \(model, batch\); name a function that needs none, or a"),
    ("broken.py:task", r"broken.py: cannot be imported: ZeroDivisionError: .* \(broken.py:1\)"),
    ("half_written.py:task", "half_written.py: cannot be imported: SyntaxError"),
    ("imports.py:task", r"No module named 'module_of_somebody' \(imports.py:1\)"),
    ("nowhere.py:task", "nowhere.py: not found"),
    ("scenes", "must have the form package.module:attribute or file.py:attribute"),
    (
        "newcomers:reduced",
        "a single number for 17 samples; give one loss per item .reduction='none'",
    ),
    ("newcomers:of_numbers", r"task loss .*: must give a tensor \[n\], gave a float"),
    ("newcomers:returns_nothing", r"must give a tensor \[n\], gave nothing \(no return\?\)"),
    ("newcomers:without_graph", "has no gradient; remove no_grad, detach or inference_mode"),
    ("newcomers:random", "at the same weights; switch sampling, dropout by hand and augment"),
    (
        "newcomers:floats_as_labels",
        r"task loss .*: failed: RuntimeError: .*Float \(scenes.py:\d+\)",
    ),
    ("newcomers:of_other_lengths", "must share their first axis, have 17, 16 rows"),
    ("newcomers:data_elsewhere", r"task splits: failed: FileNotFoundError: .*someone/else.pt'"),
    ("newcomers:one_split_bare", "must map names to data, as in {'train': "),
    (
        "newcomers:other_shapes",
        r"'0.weight' has shape \[5, 4\], but \[6, 4\] in the task's model; does the",
    ),
    ("newcomers:other_names", "'0.weight' is not in the task's model .*; does the task build the"),
    ("newcomers:model_with_argument", r"task model: needs arguments \(size\)"),
]
OUTS = [
    ("nowhere", "nowhere/analysis.json: no such file; is this the output of an analysis?"),
    ("empty", "empty/analysis.json: no such file; is this the output of an analysis?"),
    ("run", "is this the output of an analysis? it is a run: give the --out of its lcray analyze"),
    (".", "is this the output of an analysis? half is one"),
    ("file.txt", "an output is a folder: give the --out of an analysis"),
    ("out/tables/layers.parquet", "an output is a folder: give the --out of an analysis"),
    ("half", "half: has no tables yet; run the analysis again to finish it, or lcray reduce half"),
]
MISSPELLED = [
    (["analyse", "run"], "no such command 'analyse'. Did you mean 'analyze'?"),
    (["analyze", "run", "--taks", "scenes:plain"], "no such option '--taks'.*'--task'"),
    (
        ["analyze", "run", "--task", "scenes:plain"],
        "missing option '--out'; see lcray analyze --help",
    ),
    (["plan", "run"], "missing option '--task'; see lcray plan --help"),
    (["inspect"], "missing argument 'RUN'; see lcray inspect --help"),
    (["inspect", "run", "--steps", "x"], "steps 'x': write a:b"),
    (["inspect", "run", "--steps", "90:"], r"run: 0 checkpoint\(s\) with steps in '90:' of 13"),
    (["findings", "out", "--only", "shraes"], "did you mean 'shares'.*valid: shares, .*, fisher"),
    (["findings", "out", "--only", "shares,fisher"], "no table 'fisher'; analyze with --fisher"),
    (["query", "out", "SELECT * FROM layer"], 'layer does not exist! Did you mean "layers"'),
    (["query", "out", "SELECT layr FROM layers"], '"layr" not found .*"layer"'),
    (["query", "out", "SELECT * FROM fisher"], "no table 'fisher' in out: analyze with --fisher"),
    (
        ["query", "out", "SELECT", "*", "FROM", "layers"],
        "extra arguments .*; put the SELECT in quotes",
    ),
    (["query", "SELECT * FROM layers", "out"], "the output comes first, then the SELECT"),
    (["compare", "out", "out"], "out: is given twice"),
    (["demo", "--dir", "run"], "run: not empty; choose another --dir"),
]


class TestMistakes:
    @pytest.fixture(autouse=True)
    def here(self, scene: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(scene)
        monkeypatch.setattr(sys, "path", [*sys.path])

    @pytest.mark.parametrize("verb", ["inspect", "plan"])
    @pytest.mark.parametrize(("run", "said"), RUNS)
    def test_what_is_no_run(self, verb: str, run: str, said: str, outcome: Outcome) -> None:
        code, line = outcome(verb, run, *(["--task", "scenes:plain"] if verb == "plan" else []))
        assert (code, said in line) == (1, True), line

    def test_a_run_of_one_checkpoint(self, outcome: Outcome) -> None:
        code, line = outcome("analyze", "one", "--task", "scenes:plain", "--out", "new")
        assert (code, "1 checkpoint(s)" in line, "at least 2" in line) == (1, True, True)

    @pytest.mark.parametrize(("task", "said"), TASKS)
    def test_what_is_no_task(self, task: str, said: str, outcome: Outcome, tmp_path: Path) -> None:
        code, line = outcome("analyze", "run", "--task", task, "--out", tmp_path / "new")
        assert code in (1, 2)
        assert re.search(said, line), line
        assert line.startswith("lcray: task") or "checkpoint at step 0" in line

    @pytest.mark.parametrize(
        ("verb", "out", "said"),
        [
            (verb, *each)
            for verb in ("query", "findings", "verify", "status")
            for each in OUTS
            if each[0] != "half" or verb in ("query", "findings")  # the others say how far it is
        ],
    )
    def test_what_is_no_output(self, verb: str, out: str, said: str, outcome: Outcome) -> None:
        code, line = outcome(verb, out, *(["SELECT 1"] if verb == "query" else []))
        assert (code, said in line) == (1, True), line

    @pytest.mark.parametrize(("arguments", "said"), MISSPELLED)
    def test_what_is_misspelled(self, arguments: list[str], said: str, outcome: Outcome) -> None:
        code, line = outcome(*arguments)
        assert code in (1, 2)
        assert re.search(said, line), line
        assert line.startswith("lcray: ")

    @pytest.mark.parametrize(
        ("out", "said"),
        [
            ("file.txt", "file.txt: is a file; choose another --out"),
            ("run", "run: not empty, and no output of lcray; choose another --out"),
            ("out", "out: holds the analysis of another run, "),
        ],
    )
    def test_an_output_that_cannot_be(self, out: str, said: str, outcome: Outcome) -> None:
        run = "other" if out == "out" else "run"
        more = ["--span-length", 3, "--elements"]
        code, line = outcome("analyze", run, "--task", "scenes:plain", "--out", out, *more)
        assert (code, said in line) == (1, True), line

    def test_two_at_a_time(self, outcome: Outcome, scene: Path, tmp_path: Path) -> None:
        out = shutil.copytree(scene / "out", tmp_path / "out")
        with locked(out):
            code, line = outcome(
                "analyze", "run", "--task", "scenes:plain", "--out", out, "--elements"
            )
        assert code == 1
        assert f"{out}: " in line and "another" in line

    def test_an_extra_that_is_missing(
        self, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        code, line = outcome("demo", "--dir", tmp_path / "demo")
        assert (code, "pip install 'lcray[demo]'" in line) == (2, True), line

    @pytest.mark.slow
    def test_names_of_a_compiled_model_are_no_mistake(
        self, outcome: Outcome, scene: Path, tmp_path: Path
    ) -> None:
        for step in (0, 1):
            path = scenes.checkpoint(scene / "run", step)
            tensors = {f"_orig_mod.module.{k}": v for k, v in load_file(path).items()}
            (tmp_path / "run").mkdir(exist_ok=True)
            save_file(tensors, tmp_path / "run" / path.name)
        out = tmp_path / "out"
        code, _ = outcome("analyze", tmp_path / "run", "--task", "scenes:plain", "--out", out)
        assert code == 0
        assert "0.weight" in set(lcray.open(out).layers()["layer"])

    @pytest.mark.slow
    def test_an_output_in_the_folder_of_its_run_is_no_mistake(
        self, outcome: Outcome, scene: Path, tmp_path: Path
    ) -> None:
        run = shutil.copytree(scene / "run", tmp_path / "run")
        words = ["analyze", run, "--task", "scenes:plain", "--steps", "0:2", "--out", run / "out"]
        assert outcome(*words)[0] == 0
        assert outcome(*words)[0] == 0  # the run is read again, beside its output
        assert lcray.inspect(run).ok


HEAVY = {"torch", "ray", "pandas", "pyarrow", "duckdb", "scipy", "numpy"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["analyze", "--help"], ["findings", "--help"], ["analyse"]],
)
def test_help_and_refusals_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: print("loaded", *{HEAVY!r} & sys.modules.keys()))
sys.argv = ["lcray", *{arguments!r}]
from lcray.cli.app import main
main()
"""
    done = python(code)
    assert done.stdout.splitlines()[-1] == "loaded"
    assert (done.returncode == 0) == (arguments != ["analyse"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lcray ana", {"analyze"}),
        ("lcray findings out --on", {"--only"}),
        ("lcray findings out --only shares,hab", {"shares,habits"}),
        ("lcray plan run --dtype ", {"float32", "float64"}),
    ],
)
def test_completion(words: str, expected: set[str]) -> None:
    """By the protocol that click speaks with bash; nothing heavy is imported."""
    count = len(words.split(" ")) - 1
    code = f"""
import atexit, os, sys
os.environ["_LCRAY_COMPLETE"] = "bash_complete"
os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = {words!r}, "{count}"
atexit.register(lambda: print("loaded", *{HEAVY!r} & sys.modules.keys()))
sys.argv = ["lcray"]
from lcray.cli.app import main
main()
"""
    *found, last = python(code).stdout.splitlines()
    assert last == "loaded"
    assert {line.partition(",")[2] for line in found} == expected


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = scenes.python_environment()
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment
    )
