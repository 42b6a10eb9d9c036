"""The user's side: a `Task` says what cannot be guessed, once, in a module of the user's own.

Legend: B samples per batch, n items per batch (an item is a sample or a token), C classes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lcray.errors import LcrayError, TaskError, UsageError, brief, suggest

#: The data of a split: a map-style data set, or tensors (or arrays) that share their first axis.
Data = Dataset[Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """The subject of an analysis: a model, data, and a loss per item.

    Attributes:
        model: builds the model, without arguments; the architecture only, since the weights come
            from the checkpoints.
        splits: the data by the name of the split, or a function that loads it (on the workers).
        loss: ``loss(model, batch)`` gives the losses per item, [n], or ``(losses [n],
            weights [n])``; no reduction. The loss of a split is Σ w ℓ / Σ w over all its items.
            n may vary between batches, but not between evaluations.
        groups: ``groups(batch)`` gives an integer label per item, [n] (its class, say), for
            group-wise allocation. Items come sample by sample.
        collate: makes a batch of a list of samples, for data sets; torch's default otherwise.
        sample_targets: ``sample_targets(output, batch, generator)`` gives `batch` with targets
            drawn from the model's own distribution, by `generator` (on the device of `output`,
            which is the model's result for the batch). It is for the true Fisher information,
            where losses must be -log p of their target, up to a constant.
        batch_loss: whether batches are part of the loss: the losses of a batch depend on each
            other, as in InfoNCE. Batches are then a seeded permutation of the split, of the size
            in the settings (256 by default), never tuned and never sorted by group. Samples of the
            split and Fisher information do not exist then. If it is False, a loss whose items
            depend on other items of their batch is refused.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> task = Task(
        ...     model=lambda: torch.nn.Linear(4, 3),
        ...     splits={"train": (x, y)},
        ...     loss=lambda net, xy: F.cross_entropy(net(xy[0]), xy[1], reduction="none"),
        ...     groups=lambda xy: xy[1],
        ... )

    """

    model: Callable[[], nn.Module]
    splits: Callable[[], Mapping[str, Data]] | Mapping[str, Data]
    loss: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
    groups: Callable[[Any], Tensor] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    sample_targets: Callable[[Any, Any, Generator], Any] | None = None
    batch_loss: bool = False


@dataclass(frozen=True)
class TaskSource:
    """The origin of a task, in a form that a worker on another machine can load.

    Attributes:
        reference: ``package.module:attribute`` or ``path/file.py:attribute``; for an object that
            was passed directly, a description.
        task: the object itself, if it cannot be imported (as in a notebook).
    """

    reference: str
    task: Task | None = None

    def load(self) -> Task:
        """The task, imported if necessary.

        Raises:
            TaskError: if it cannot be imported or is not a task.
        """
        if self.task is not None:
            return self.task
        return load_task(self.reference)


def locate(task: str | Task) -> TaskSource:
    """The source from which workers load `task`; the path of a file is made absolute.

    Raises:
        UsageError: if `task` is neither a reference nor a `Task`.
    """
    if isinstance(task, Task):
        return TaskSource(f"<{type(task).__name__} object>", task)
    if not isinstance(task, str):
        raise UsageError(
            f"task: needs a Task or 'package.module:attribute', not a {type(task).__name__}"
        )
    name, attribute = _split(task)
    if name.endswith(".py"):
        path = Path(name).resolve()
        return TaskSource(f"{path}:{attribute}")
    return TaskSource(task)


def load_task(reference: str) -> Task:
    """The task that ``package.module:attribute`` or ``path/file.py:attribute`` names.

    The attribute is a `Task`, or a function without required arguments that returns one.

    Raises:
        UsageError: if the reference does not have one of these forms.
        TaskError: if it cannot be imported, or is not a task.
    """
    name, attribute = _split(reference)
    module = _import_file(Path(name)) if name.endswith(".py") else _import_module(name)
    try:
        found = getattr(module, attribute)
    except AttributeError:
        known = [key for key, value in vars(module).items() if _may_be_task(module, value)]
        raise TaskError(f"task {reference!r}: " + suggest(attribute, known, "attribute")) from None
    return found if isinstance(found, Task) else _call_factory(reference, found)


def _may_be_task(module: ModuleType, value: Any) -> bool:
    own = inspect.isfunction(value) and value.__module__ == module.__name__
    return isinstance(value, Task) or (own and not required_arguments(value))


def _split(reference: str) -> tuple[str, str]:
    name, colon, attribute = reference.rpartition(":")
    if not (name and colon and attribute.isidentifier()):
        raise UsageError(
            f"task {reference!r}: must have the form package.module:attribute or file.py:attribute"
        )
    return name, attribute


def _import_module(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = ""
        if error.name == name.partition(".")[0]:
            hint = "; run from its folder, or name it path/file.py:attribute"
        raise TaskError(f"task module {name!r}: cannot be imported: {error}{hint}") from error
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise TaskError(f"task module {name!r}: cannot be imported: {brief(error)}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise TaskError(f"task file {path}: not found")
    # An installed module, or a task in another folder, may have the file's name.
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"_lcray_task_{name}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task file {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(f"task file {path}: cannot be imported: {brief(error)}") from error
    return module


def _call_factory(reference: str, factory: Any) -> Task:
    if not callable(factory):
        raise TaskError(f"task {reference!r}: is a {type(factory).__name__}, must be a lcray.Task")
    required = required_arguments(factory)
    if required:
        raise TaskError(
            f"task {reference!r}: needs arguments ({', '.join(required)}); name a function that "
            "needs none, or a lcray.Task"
        )
    try:
        task = factory()
    except Exception as error:
        raise TaskError(f"task {reference!r}: failed: {brief(error)}") from error
    if not isinstance(task, Task):
        raise TaskError(f"task {reference!r}: gave a {type(task).__name__}, must be a lcray.Task")
    return task


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that `function` needs."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    free = [p for p in parameters if p.default is p.empty]
    names = [p.name for p in free if p.kind in positional]
    return names + [p.name for p in free if p.kind is p.KEYWORD_ONLY]


def source_hash(task: Task, model: nn.Module) -> str:
    """SHA-256 of the source of the modules that define the parts of the task and of the model.

    Modules that a package manager installed count by name only: their versions are recorded
    elsewhere. If there is no source (in an interactive session), the parts' bytecode is used. For a
    `functools.partial` that builds the model or is the loss, plain arguments count as well.
    """
    # The order of a set differs from process to process, and two classes may have one name.
    kinds = sorted(
        {type(part) for part in model.modules()},
        key=lambda kind: (kind.__qualname__, _source_of(kind)),
    )
    parts: list[Any] = [task.model, task.splits, task.loss, task.groups, task.collate]
    parts += [task.sample_targets, *kinds]
    digest = hashlib.sha256()
    for source in dict.fromkeys(_source_of(part) for part in parts):
        digest.update(source)
    for argument in (*_arguments(task.model), *_arguments(task.loss)):
        digest.update(argument)
    return digest.hexdigest()


def _arguments(part: Any) -> list[bytes]:
    """The arguments that a `functools.partial` holds, if they are the same in every process."""
    if not isinstance(part, partial):
        return []
    held = [("", value) for value in part.args] + sorted(part.keywords.items())
    plain = (str, int, float, bool, bytes, type(None))
    return [repr(each).encode() for each in held if isinstance(each[1], plain)]


def _source_of(part: Any) -> bytes:
    if part is None or isinstance(part, Mapping):
        return b"-"
    function = getattr(part, "func", part)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    path = getattr(module, "__file__", None)
    # On a worker, __main__ is the worker's own script, not the user's.
    if not path or not Path(path).is_file() or module is sys.modules["__main__"]:
        return _code_of(function)
    if "site-packages" in path:
        return str(getattr(function, "__qualname__", path)).encode()
    return Path(path).read_bytes()


def _code_of(part: Any) -> bytes:
    """Bytecode, names and constants of a function, or of the methods of a class."""
    code = part if inspect.iscode(part) else getattr(part, "__code__", None)
    if code is not None:
        named = repr((code.co_names, code.co_varnames)).encode()
        return b"\0".join([code.co_code, named, *map(_constant, code.co_consts)])
    kind = part if inspect.isclass(part) else type(part)
    methods = {name: getattr(value, "__func__", value) for name, value in vars(kind).items()}
    known = [_code_of(value) for value in methods.values() if inspect.isfunction(value)]
    return b"\0".join([kind.__qualname__.encode(), *known])


def _constant(value: Any) -> bytes:
    if inspect.iscode(value):
        return _code_of(value)
    # The order of a set of strings differs from process to process.
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value).encode()


def call_model(task: Task) -> nn.Module:
    """The task's model, newly built.

    Raises:
        TaskError: if it cannot be built without arguments, or is not a module.
    """
    if isinstance(task.model, nn.Module):
        name = type(task.model).__name__
        raise TaskError(f"task model: is a {name} itself; give a function that builds it")
    required = required_arguments(task.model)
    if required:
        raise TaskError(
            f"task model: needs arguments ({', '.join(required)}); give a function that needs none"
        )
    try:
        model = task.model()
    except Exception as error:
        raise TaskError(f"task model: failed: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"task model: gave a {type(model).__name__}, must be a torch.nn.Module")
    return model


def split_data(task: Task, names: Sequence[str] | None = None) -> dict[str, Data]:
    """The data of the splits called `names` (all of them by default), in the task's order.

    Raises:
        TaskError: if the data cannot be loaded, or a split is empty or of an unsupported kind.
        UsageError: for an unknown name.
    """
    try:
        data = task.splits() if callable(task.splits) else task.splits
    except LcrayError:
        raise
    except Exception as error:
        raise TaskError(f"task splits: failed: {brief(error)}") from error
    if not isinstance(data, Mapping) or not data:
        raise TaskError("task splits: must map names to data, as in {'train': (images, labels)}")
    for name in names or ():
        if name not in data:
            raise UsageError(suggest(name, data, "split"))
    chosen = {name: value for name, value in data.items() if names is None or name in names}
    for name, value in chosen.items():
        _check_split(name, value)
    return chosen


def _check_split(name: str, data: Any) -> None:
    where = f"task split {name!r}"
    if isinstance(data, tuple | TensorDataset):
        for number, part in enumerate(data if isinstance(data, tuple) else data.tensors):
            _check_part(f"{where}, part {number}", part)
    if isinstance(data, tuple):
        lengths = [_length(part) for part in data]
        if len(set(lengths)) != 1 or None in lengths:
            shown = ", ".join("no" if n is None else str(n) for n in lengths)
            raise TaskError(f"{where}: its tensors must share their first axis, have {shown} rows")
        length = lengths[0]
    elif _is_table(data):
        raise TaskError(
            f"{where}: is a {type(data).__name__}; pass a tuple of arrays, as in "
            "(table[columns].to_numpy(), table['label'].to_numpy())"
        )
    elif isinstance(data, Mapping) and 0 not in data:
        raise TaskError(
            f"{where}: is a {type(data).__name__} of columns; pass a tuple of tensors, or a data "
            "set whose samples are mappings"
        )
    elif hasattr(data, "__getitem__") and not isinstance(data, Tensor | IterableDataset):
        length = _length(data)
        if length is None:
            raise TaskError(f"{where}: its {type(data).__name__} has no length; give it a __len__")
    else:
        kind = type(data).__name__
        raise TaskError(f"{where}: must be a map-style Dataset or a tuple of tensors, not {kind}")
    if length == 0:
        raise TaskError(f"{where}: is empty")


def _is_table(data: Any) -> bool:
    """Whether it is a table of pandas, polars or Arrow: rows are not indexed by their numbers."""
    arrow = type(data).__module__.partition(".")[0] == "pyarrow"
    return arrow or (hasattr(data, "to_numpy") and not isinstance(data, Dataset))


def _check_part(where: str, part: Any) -> None:
    """Refuse data that cannot become a tensor, or would become one with wrong values."""
    kind = type(part).__name__
    if hasattr(part, "to_numpy"):  # rows by label, not by position
        raise TaskError(f"{where}: is a {kind}; pass .to_numpy()")
    if hasattr(part, "toarray"):
        raise TaskError(f"{where}: is a sparse {kind}; pass .toarray()")
    if np.ma.is_masked(part):
        raise TaskError(f"{where}: has masked values; pass .filled(VALUE), or leave them out")
    if isinstance(part, Tensor):
        if part.is_nested or part.layout != torch.strided:
            raise TaskError(f"{where}: is a sparse or nested tensor; pass a dense one")
        if part.is_meta or part.is_quantized:
            what = "a meta tensor, without values" if part.is_meta else "quantized"
            raise TaskError(f"{where}: is {what}; pass a plain tensor")


def _length(part: Any) -> int | None:
    try:
        return len(part)
    except (TypeError, NotImplementedError):  # no __len__, or a tensor without axes
        return None
