from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import textwrap
import types
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lcray.errors import TaskError, UsageError
from lcray.tasks.task import (
    Task,
    call_model,
    load_task,
    locate,
    required_arguments,
    source_hash,
    split_data,
)

TASK = """
import torch
import torch.nn.functional as F
from lcray.tasks.task import Task
x, y = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
def model():
    return torch.nn.Linear(2, 2)
def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none") * 1.0
task = Task(model=model, splits={"train": (x, y)}, loss=loss)
"""


@pytest.fixture(autouse=True)
def own_imports() -> Iterator[None]:
    """Whatever a test imports is gone after it."""
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules.update(modules)


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


def refusal(reference: str) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(reference)
    message = str(caught.value)
    assert "\n" not in message
    return message


def make(**parts: object) -> Task:
    known: dict = {"model": lambda: nn.Linear(2, 2), "splits": {"train": (torch.ones(3, 2),)}}
    return Task(**{**known, "loss": lambda net, batch: net(batch[0]).sum(1), **parts})


class TestLoading:
    def test_a_module_in_the_working_folder(self, tmp_path: Path, monkeypatch) -> None:
        write(tmp_path / "mypkg" / "__init__.py", "")
        write(tmp_path / "mypkg" / "inner.py", TASK)
        monkeypatch.chdir(tmp_path)
        task = load_task("mypkg.inner:task")
        assert task is sys.modules["mypkg.inner"].task
        assert task is load_task("mypkg.inner:task")

    def test_a_file_and_its_siblings(self, tmp_path: Path, monkeypatch) -> None:
        write(tmp_path / "a" / "sibling_of_task.py", "SCALE = 3.5")
        file = write(tmp_path / "a" / "lc_file.py", TASK + "from sibling_of_task import SCALE\n")
        monkeypatch.chdir(tmp_path)
        task = load_task("a/lc_file.py:task")
        assert isinstance(task, Task)
        assert sys.modules["lc_file"].SCALE == 3.5
        assert load_task(f"{file}:task") is task, "loading again gives the same object"

    def test_a_relative_and_an_absolute_path_are_one_file(self, tmp_path, monkeypatch) -> None:
        file = write(tmp_path / "sub" / "lc_twice.py", TASK)
        monkeypatch.chdir(tmp_path / "sub")
        assert load_task("../sub/lc_twice.py:task") is load_task(f"{file}:task")

    def test_a_stem_that_an_installed_module_has(self, tmp_path: Path) -> None:
        import statistics

        file = write(tmp_path / "statistics.py", TASK + "MARK = 1\n")
        task = load_task(f"{file}:task")
        assert sys.modules["statistics"] is statistics
        assert statistics.fmean([1, 3]) == 2
        # Otherwise classes that it defines would differ from one load to the next.
        assert load_task(f"{file}:task") is task

    def test_two_files_of_one_name_do_not_mix(self, tmp_path: Path) -> None:
        files = [write(tmp_path / str(n) / "lc_same.py", TASK + f"N = {n}\n") for n in range(3)]
        tasks = [load_task(f"{file}:task") for file in files]
        assert [sys.modules[task.loss.__module__].N for task in tasks] == [0, 1, 2]
        assert [load_task(f"{file}:task") is t for file, t in zip(files, tasks, strict=True)] == [
            True,
            True,
            True,
        ]

    def test_a_factory_is_called(self, tmp_path: Path) -> None:
        source = TASK + "def make(size=3):\n    return Task(model, {'one': (x[:size],)}, loss)\n"
        file = write(tmp_path / "lc_factory.py", source)
        assert list(load_task(f"{file}:make").splits) == ["one"]
        assert len(load_task(f"{file}:make").splits["one"][0]) == 3

    def test_a_factory_that_needs_arguments(self, tmp_path: Path) -> None:
        file = write(tmp_path / "lc_needs.py", TASK + "def make(a, b=1, *, c):\n    return task\n")
        assert "needs arguments (a, c); name a function that needs none" in refusal(f"{file}:make")

    def test_a_factory_that_raises_or_gives_something_else(self, tmp_path: Path) -> None:
        source = "def bad():\n    raise ValueError('two\\nlines')\ndef other():\n    return 3\n"
        file = write(tmp_path / "lc_bad.py", source)
        assert refusal(f"{file}:bad").endswith("failed: ValueError: two lines (lc_bad.py:2)")
        assert refusal(f"{file}:other").endswith("gave a int, must be a lcray.Task")

    def test_something_else_than_a_task(self, tmp_path: Path) -> None:
        file = write(tmp_path / "lc_number.py", "task = 3")
        assert refusal(f"{file}:task").endswith("is a int, must be a lcray.Task")

    def test_an_error_inside_names_file_and_reason(self, tmp_path: Path) -> None:
        file = write(tmp_path / "lc_broken.py", "x = 1\nraise RuntimeError('no\\ndata')")
        message = refusal(f"{file}:task")
        reason = "RuntimeError: no data (lc_broken.py:2)"
        assert message == f"task file {file}: cannot be imported: {reason}"
        assert "lc_broken" not in sys.modules, "a half-made module must not be found again"

    @pytest.mark.parametrize("source", ["import sys; sys.exit(0)", "raise SystemExit('usage')"])
    def test_a_script_that_exits_is_refused_not_obeyed(self, tmp_path, source, monkeypatch) -> None:
        file = write(tmp_path / "lc_exits.py", source)
        assert "cannot be imported: SystemExit" in refusal(f"{file}:task")
        monkeypatch.chdir(tmp_path)
        assert "cannot be imported: SystemExit" in refusal("lc_exits:task")

    def test_a_syntax_error(self, tmp_path: Path) -> None:
        file = write(tmp_path / "lc_syntax.py", "def f(:\n")
        assert "SyntaxError" in refusal(f"{file}:task")

    def test_a_module_that_does_not_exist(self) -> None:
        message = refusal("lc_no_such_module:task")
        assert message.startswith("task module 'lc_no_such_module': cannot be imported")

    def test_a_file_that_does_not_exist(self, tmp_path: Path) -> None:
        assert refusal(f"{tmp_path}/gone.py:task") == f"task file {tmp_path}/gone.py: not found"

    def test_a_missing_attribute_names_the_nearest(self, tmp_path: Path) -> None:
        source = TASK + "def make_task():\n    return task\ndef helper(a):\n    return a\n"
        file = write(tmp_path / "lc_near.py", source)
        assert "unknown attribute 'tsk': did you mean 'task'?" in refusal(f"{file}:tsk")
        message = refusal(f"{file}:mak_task")
        assert "did you mean 'make_task'?" in message
        assert "helper" not in message, "it needs an argument, so it is no task"

    @pytest.mark.parametrize(
        "text", ["task", "module:", ":task", "a.py:b.c", "a b:1x", "", "m:a-b"]
    )
    def test_a_malformed_reference(self, text: str) -> None:
        for use in (load_task, locate):
            with pytest.raises(UsageError, match="must have the form") as caught:
                use(text)
            assert repr(text) in str(caught.value)


class TestSource:
    def test_a_task_object_stays_itself(self) -> None:
        task = make()
        assert locate(task).load() is task

    @pytest.mark.parametrize("wrong", [3, None, nn.Linear(1, 1)])
    def test_neither_task_nor_reference(self, wrong: object) -> None:
        with pytest.raises(UsageError, match=r"needs a Task or 'package.module:attribute'"):
            locate(wrong)  # type: ignore[arg-type]

    def test_a_module_is_found_by_its_name(self, tmp_path: Path, monkeypatch) -> None:
        write(tmp_path / "lc_named.py", TASK)
        monkeypatch.chdir(tmp_path)
        source = locate("lc_named:task")
        assert source.reference == "lc_named:task" and source.task is None
        assert source.load() is load_task("lc_named:task")

    def test_a_file_loads_in_another_process_and_folder(self, tmp_path, monkeypatch) -> None:
        """The source travels: its text is all that the other process gets."""
        write(tmp_path / "code" / "lc_sibling.py", "NAME = 'from the sibling'")
        source = "from lc_sibling import NAME\n" + TASK.replace("train", "{NAME}").replace(
            '"{NAME}"', "NAME"
        )
        write(tmp_path / "code" / "lc_remote.py", source)
        monkeypatch.chdir(tmp_path / "code")
        found = locate("lc_remote.py:task")
        assert found.task is None
        program = f"from lcray.tasks.task import TaskSource\nprint(*{found!r}.load().splits)"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == "from the sibling", done.stderr


class TestSourceHash:
    def hash_of(self, file: Path) -> str:
        task = load_task(f"{file}:task")
        found = source_hash(task, task.model())
        for name in ("lc_hashed", "lc_part"):
            sys.modules.pop(name, None)
        return found

    def test_it_follows_the_source_and_nothing_else(self, tmp_path: Path) -> None:
        file = write(tmp_path / "lc_hashed.py", TASK)
        before = self.hash_of(file)
        assert self.hash_of(file) == before
        write(tmp_path / "unrelated.py", "x = 1")
        os.utime(file, (1, 1))
        assert self.hash_of(file) == before
        write(file, TASK.replace("* 1.0", "* 2.0"))
        assert self.hash_of(file) != before

    def test_the_loss_and_the_model_may_live_elsewhere(self, tmp_path: Path) -> None:
        part = textwrap.dedent("""
            from torch import nn
            class Net(nn.Linear):
                pass
            def other_loss(net, batch):
                return net(batch[0]).sum(1)
        """)
        write(tmp_path / "lc_part.py", part)
        source = TASK + "import lc_part\ntask = Task({}, {'train': (x, y)}, {})\n"
        for model, loss in (("lambda: lc_part.Net(2, 2)", "loss"), ("model", "lc_part.other_loss")):
            file = write(
                tmp_path / "lc_hashed.py", source.replace("{}", model, 1).replace("{})", f"{loss})")
            )
            write(tmp_path / "lc_part.py", part)
            before = self.hash_of(file)
            write(tmp_path / "lc_part.py", part + "\n# changed\n")
            assert self.hash_of(file) != before

    @pytest.mark.parametrize(
        "changed",
        [
            "net(batch[0]).sum(1) * 3.0",
            "net(batch[0]).mean(1) * 2.0",
            "(lambda v: v * 3.0)(net(batch[0]))",
        ],
    )
    def test_typed_code_counts_with_its_constants_and_names(self, changed: str) -> None:
        def typed(expression: str) -> Task:
            space = {"__name__": "__main__"}
            exec(f"def loss(net, batch):\n    return {expression}", space)
            return make(loss=space["loss"])

        net = nn.Linear(2, 2)
        base = source_hash(typed("net(batch[0]).sum(1) * 2.0"), net)
        assert base == source_hash(typed("net(batch[0]).sum(1) * 2.0"), net)
        assert base != source_hash(typed(changed), net)

    def test_typed_classes_count_with_their_methods(self) -> None:
        def typed(factor: float) -> nn.Module:
            space = {"__name__": "__main__", "nn": nn}
            text = "class Net(nn.Linear):\n    def forward(self, x):\n        return x * "
            exec(f"{text}{factor}", space)
            return space["Net"](2, 2)

        task = make()
        assert source_hash(task, typed(2.0)) == source_hash(task, typed(2.0))
        assert source_hash(task, typed(2.0)) != source_hash(task, typed(3.0))

    def test_the_order_of_a_set_does_not_count(self) -> None:
        # It differs from process to process for words; for these numbers it follows insertion.
        sets = frozenset([0, 8]), frozenset([8, 0])
        assert sets[0] == sets[1] and list(sets[0]) != list(sets[1])

        def typed(values: frozenset) -> Task:
            space: dict = {"__name__": "__main__"}
            exec("def loss(net, batch):\n    return 'constant'", space)
            code = space["loss"].__code__
            space["loss"].__code__ = code.replace(co_consts=(None, values))
            return make(loss=space["loss"])

        net = nn.Linear(2, 2)
        assert source_hash(typed(sets[0]), net) == source_hash(typed(sets[1]), net)
        assert source_hash(typed(sets[0]), net) != source_hash(typed(frozenset([1])), net)

    def test_classes_of_one_name_count_in_one_order(self) -> None:
        # A set of classes is ordered by their addresses, which differ from process to process.
        def typed(factor: int) -> type[nn.Module]:
            space = {"__name__": "__main__", "nn": nn}
            text = "class Linear(nn.Linear):\n    def forward(self, x):\n        return x * "
            exec(f"{text}{factor}", space)
            return space["Linear"]

        task, kept, found = make(), [], set()
        for _ in range(20):
            kept.append([typed(2), nn.Linear, typed(3)])
            found.add(source_hash(task, nn.Sequential(*(kind(2, 2) for kind in kept[-1]))))
            kept[-1].append(typed(5))  # so that addresses do not come again in the same order
        assert len(found) == 1

    def test_the_hash_of_ordinary_models_stays(self) -> None:
        # Outputs that were begun before must go on: installed parts by name, classes in their
        # order, each once, "-" for what is data or missing.
        task = Task(nn.Identity, {"train": (torch.ones(1),)}, nn.functional.mse_loss)
        model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        expected = hashlib.sha256(b"Identity-mse_lossLinearReLUSequential")
        assert source_hash(task, model) == expected.hexdigest()

    def test_partial_functions_and_callable_objects_count(self, tmp_path: Path) -> None:
        module = types.ModuleType("lc_object")
        file = write(tmp_path / "lc_object.py", "x = 1")
        module.__file__ = str(file)
        sys.modules["lc_object"] = module
        exec(
            "class Loss:\n    def __call__(self, n, b): return n\ndef f(k, n, b): return n",
            vars(module),
        )
        net = nn.Linear(2, 2)
        for loss in (module.Loss(), functools.partial(module.f, 1)):
            write(file, "x = 1")
            before = source_hash(make(loss=loss), net)
            write(file, "x = 2")
            assert source_hash(make(loss=loss), net) != before


class TestModel:
    def refusal(self, model: object) -> str:
        with pytest.raises(TaskError) as caught:
            call_model(make(model=model))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_it_is_built_anew_each_time(self) -> None:
        task = make()
        assert call_model(task) is not call_model(task)

    def test_a_builder_that_needs_arguments(self) -> None:
        assert "needs arguments (in_features, out_features)" in self.refusal(nn.Linear)

    def test_a_module_instead_of_a_builder(self) -> None:
        message = self.refusal(nn.Linear(2, 2))
        assert message == "task model: is a Linear itself; give a function that builds it"

    def test_a_builder_of_something_else(self) -> None:
        assert self.refusal(lambda: 3) == "task model: gave a int, must be a torch.nn.Module"

    def test_a_builder_that_raises(self) -> None:
        def build() -> nn.Module:
            raise OSError("no\nweights")

        line = build.__code__.co_firstlineno + 1
        expected = f"task model: failed: OSError: no weights (test_task.py:{line})"
        assert self.refusal(build) == expected

    def test_required_arguments(self) -> None:
        def function(a, b, /, c, d=1, *args, e, f=2, **kwargs) -> None: ...

        assert required_arguments(function) == ["a", "b", "c", "e"]
        assert required_arguments(functools.partial(function, 1, e=3)) == ["b", "c"]
        assert required_arguments(dict) == [], "no signature, no complaint"


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class EndlessWithLength(Endless):
    def __len__(self) -> int:
        return 3


class NoLength(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class TestSplits:
    def refusal(self, data: object) -> str:
        with pytest.raises(TaskError) as caught:
            split_data(make(splits={"train": data}))
        message = str(caught.value)
        assert message.startswith("task split 'train'") and "\n" not in message
        return message

    def test_the_tasks_order_rules(self) -> None:
        data = {name: (torch.ones(2),) for name in ("b", "a", "c")}
        assert list(split_data(make(splits=data))) == ["b", "a", "c"]
        assert list(split_data(make(splits=lambda: data), ("c", "b"))) == ["b", "c"]

    def test_an_unknown_name_gets_the_nearest(self) -> None:
        task = make(splits={"train": (torch.ones(1),), "val": (torch.ones(1),)})
        with pytest.raises(UsageError, match=r"unknown split 'trian': did you mean 'train'\?"):
            split_data(task, ("trian",))

    def test_a_broken_split_that_nobody_asked_for_is_left_alone(self) -> None:
        task = make(splits={"train": (torch.ones(1),), "val": ()})
        assert list(split_data(task, ("train",))) == ["train"]

    @pytest.mark.parametrize("splits", [{}, 3, lambda: None, [("train", (1,))]])
    def test_splits_must_be_a_mapping(self, splits: object) -> None:
        with pytest.raises(TaskError, match=r"must map names to data, as in \{'train'"):
            split_data(make(splits=splits))

    def test_a_loader_that_raises(self) -> None:
        def load() -> dict:
            raise FileNotFoundError("no\nfile")

        with pytest.raises(
            TaskError, match=r"^task splits: failed: FileNotFoundError: no file \(test"
        ):
            split_data(make(splits=load))

    @pytest.mark.parametrize(
        "data",
        [
            (torch.ones(0, 2), torch.ones(0)),
            [],
            TensorDataset(torch.ones(0, 2)),
            (np.ones((0, 3)),),
        ],
    )
    def test_empty(self, data: object) -> None:
        assert self.refusal(data).endswith("is empty")

    @pytest.mark.parametrize(
        ("data", "line"),
        [
            (
                pd.DataFrame({"a": [1.0]}),
                "is a DataFrame; pass a tuple of arrays, as in",
            ),
            (pd.Series([1.0, 2.0], index=[6, 7]), r"is a Series; pass .*\.to_numpy\(\)"),
            (pa.table({"a": [1.0]}), r"is a Table; pass a tuple of arrays"),
            ({"x": torch.ones(2)}, "is a dict of columns; pass a tuple of tensors, or a data set"),
        ],
    )
    def test_tables(self, data: object, line: str) -> None:
        assert re.fullmatch(rf"task split 'train': {line}.*", self.refusal(data))

    @pytest.mark.parametrize(
        ("part", "line"),
        [
            (pd.DataFrame({"a": [1.0, 2.0]}), "is a DataFrame; pass .to_numpy()"),
            (pd.Series([1.0, 2.0]), "is a Series; pass .to_numpy()"),
            (pa.array([1.0, 2.0]), "is a DoubleArray; pass .to_numpy()"),
            (scipy.sparse.csr_array(np.eye(2)), "is a sparse csr_array; pass .toarray()"),
            (
                np.ma.masked_array([1.0, 2.0], [False, True]),
                "has masked values; pass .filled(VALUE), or leave them out",
            ),
            (torch.eye(2).to_sparse(), "is a sparse or nested tensor; pass a dense one"),
            (torch.ones(2, device="meta"), "is a meta tensor, without values; pass a plain tensor"),
        ],
    )
    def test_parts_that_are_no_plain_arrays(self, part: object, line: str) -> None:
        for data in ((torch.ones(2), part), (part, torch.ones(2))):
            number = 1 if data[1] is part else 0
            assert self.refusal(data) == f"task split 'train', part {number}: {line}"

    @pytest.mark.parametrize("data", [Endless(), EndlessWithLength(), torch.ones(3), 3, iter([1])])
    def test_another_kind(self, data: object) -> None:
        message = self.refusal(data)
        assert "must be a map-style Dataset or a tuple of tensors" in message
        assert type(data).__name__ in message

    def test_a_data_set_without_a_length(self) -> None:
        assert "NoLength has no length" in self.refusal(NoLength())

    def test_lengths_that_differ_are_shown(self) -> None:
        message = self.refusal((torch.ones(3, 2), torch.ones(4)))
        assert message.endswith("its tensors must share their first axis, have 3, 4 rows")

    def test_a_number_among_the_tensors(self) -> None:
        assert self.refusal((torch.ones(3), torch.tensor(1.0))).endswith("have 3, no rows")
        assert self.refusal((torch.ones(3), 7)).endswith("have 3, no rows")
        assert "share their first axis" in self.refusal(())

    @pytest.mark.parametrize(
        "data",
        [
            (torch.ones(3, 2), torch.ones(3)),
            (np.ones((3, 2)), [1, 2, 3]),
            namedtuple("Pair", "x y")(torch.ones(3), torch.ones(3)),
            TensorDataset(torch.ones(3)),
            [torch.ones(2)] * 3,
        ],
    )
    def test_what_is_welcome_comes_back_as_it_is(self, data: object) -> None:
        assert split_data(make(splits={"train": data}))["train"] is data


def test_a_module_that_is_not_found_comes_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = "; run from its folder, or name it path/file.py:attribute"
    for name in ("lc_no_such_module", "lc_no_such_package.part"):
        with pytest.raises(TaskError) as caught:
            load_task(f"{name}:task")
        assert str(caught.value).endswith(f"No module named {name.partition('.')[0]!r}{hint}")
    # Where it is found, but lacks something that it imports, the hint would mislead.
    write(tmp_path / "lc_needs_more.py", "import lc_no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError) as caught:
        load_task("lc_needs_more:task")
    assert str(caught.value).endswith("No module named 'lc_no_such_dependency'")
