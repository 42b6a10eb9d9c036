"""A run on disk: its checkpoints in numeric order."""

from __future__ import annotations

import os
import shlex
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from torch import Tensor

from lcray.checkpoints import naming
from lcray.checkpoints.listing import Folders
from lcray.checkpoints.reading import Checkpoint, State, joined, read_checkpoint
from lcray.errors import CheckpointError, UsageError
from lcray.storage import Place, PlaceLike, place
from lcray.storage.files import ANALYSIS
from lcray.storage.numbers import step_range

# Within one checkpoint folder, in the order in which `from_pretrained` tries them.
_MODEL_FILES = (
    "model" + naming.SAFETENSORS,
    "model" + naming.INDEX,
    "adapter_model" + naming.SAFETENSORS,
)


@dataclass(frozen=True)
class CheckpointSeries:
    """The checkpoints of one run, sorted by step as a number (9000 before 10000).

    `begins` is the first step of the run, even if only later checkpoints are chosen.
    """

    root: Place
    checkpoints: tuple[Checkpoint, ...]
    begins: int = 0

    @property
    def late_start(self) -> str | None:
        """A message if step 0 is missing; None if it is there or was not asked for."""
        if self.begins == 0 or self.begins != self.checkpoints[0].step:
            return None
        return (
            f"the run begins at step {self.begins}: step 0 is missing, so the initial weights and "
            "the first change of them, often the largest, are not part of it"
        )

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps, ascending."""
        return tuple(self._by_step)

    @cached_property
    def _by_step(self) -> dict[int, Checkpoint]:
        return {checkpoint.step: checkpoint for checkpoint in self.checkpoints}

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of `step`; raises CheckpointError if there is none."""
        found = self._by_step.get(step)
        if found is None:
            raise CheckpointError(
                f"{self.root}: no checkpoint of step {step}; "
                f"there are {len(self.checkpoints)}, from {self.steps[:1]} to {self.steps[-1:]}"
            )
        return found

    def read(self, step: int, into: Mapping[str, Tensor] | None = None) -> State:
        """Read the checkpoint of `step` as a whole, in one pass.

        Args:
            step: of the checkpoint.
            into: memory to read into, by canonical name; see `read_checkpoint`.

        Raises:
            CheckpointError: no such step, or a file that is missing, torn or malformed, or that
                changes in length while it is read; the content of `into` is then undefined.
        """
        return read_checkpoint(self.checkpoint(step), into)


def open_series(run: PlaceLike, steps: str | None = None, *, minimum: int = 2) -> CheckpointSeries:
    """Find the checkpoints of a run.

    Any naming with one integer works: ``step-00000010.safetensors``, ``model_step10.safetensors``,
    ``checkpoint-500/model.safetensors`` (single, sharded or an adapter).

    Args:
        run: a directory, or its URI.
        steps: ``"a:b"`` keeps the checkpoints with a <= step <= b; either side may be empty.
        minimum: the least number of checkpoints.

    Raises:
        CheckpointError: missing or empty run, too few checkpoints, only pickled files, or two
            checkpoints of one step.
        UsageError: `steps` is not a range.
    """
    keep = _parse_range(steps)
    folders = Folders(place(run))
    root = folders.root
    found = _checkpoints(folders)
    if not found:
        raise CheckpointError(_why_empty(folders))
    kept = tuple(checkpoint for checkpoint in found if keep(checkpoint.step))
    if len(kept) < minimum:
        chosen = f" with steps in {steps!r}" if steps is not None else ""
        raise CheckpointError(
            f"{root}: {len(kept)} checkpoint(s){chosen} of {len(found)} "
            f"(steps {found[0].step} to {found[-1].step}), and at least {minimum} are needed"
        )
    return CheckpointSeries(root, kept, found[0].step)


def list_checkpoints(root: Place) -> tuple[Checkpoint, ...]:
    """Every checkpoint in a directory, by step; empty if there is none.

    Raises:
        CheckpointError: no such directory, or two checkpoints of one step.
    """
    return _checkpoints(Folders(root))


def _checkpoints(folders: Folders) -> tuple[Checkpoint, ...]:
    found: dict[int, Checkpoint] = {}
    root = folders.root
    entries = folders.entries(root)
    names = [name for name, _ in entries]
    for name, is_dir in entries:
        files = _in_folder(folders, root / name) if is_dir else _flat(folders, root, name, names)
        try:
            step = naming.parse_step(name) if files else None
        except CheckpointError as error:
            raise CheckpointError(f"{root}: {error}") from error
        if step is None:
            continue
        if step in found:
            raise CheckpointError(
                f"{root}: {_below(root, found[step].files[0])} and "
                f"{_below(root, files[0])} are both step {step}; move one of them away"
            )
        described = [folders.described(file) for file in files]
        size, stamp = sum(size for size, _ in described), joined([stamp for _, stamp in described])
        found[step] = Checkpoint(step, files, size, stamp)
    return tuple(found[step] for step in sorted(found))


def _below(root: Place, file: Place) -> str:
    return str(file).removeprefix(f"{root}/")


def _parse_range(steps: str | None) -> Callable[[int], bool]:
    if steps is None:
        return lambda step: True
    found = step_range(steps)
    if found is None:
        raise UsageError(f"steps {steps!r}: write a:b; either step may be left out")
    low, high = found[0] or 0, found[1]
    return lambda step: low <= step and (high is None or step <= high)


def _flat(folders: Folders, folder: Place, name: str, names: Sequence[str]) -> tuple[Place, ...]:
    return _with_shards(folders, folder, name, names) if naming.is_weights(name) else ()


def _in_folder(folders: Folders, folder: Place) -> tuple[Place, ...]:
    """The model in a checkpoint folder, or nothing (a folder of logs is not a checkpoint)."""
    if not any(character.isdigit() for character in folder.name):
        return ()
    if folder.name.endswith(naming.SAFETENSORS):
        return (folder,)  # listed, so that reading it reports what is wrong
    names = [name for name, is_dir in folders.entries(folder) if not is_dir]
    for name in _MODEL_FILES:
        if name in names:
            return _with_shards(folders, folder, name, names)
    others = [name for name in names if naming.is_weights(name)]
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: cannot tell which of {', '.join(others)} is the model; "
            "name it model.safetensors"
        )
    return _with_shards(folders, folder, others[0], names) if others else ()


def _with_shards(
    folders: Folders, folder: Place, name: str, names: Sequence[str]
) -> tuple[Place, ...]:
    """A file, with its shards if it is an index; `names` are sorted."""
    if not name.endswith(naming.INDEX):
        return (folders.file(folder, name),)
    base = naming.stem(name) + "-"
    following = (names[i] for i in range(bisect_left(names, base), len(names)))
    near = takewhile(lambda n: n.startswith(base), following)
    shards = [n for n in near if naming.is_shard_of(n, name)]
    return tuple(folders.file(folder, n) for n in (name, *shards))


def _why_empty(folders: Folders) -> str:
    root, entries = folders.root, folders.entries(folders.root)
    files = [root / name for name, is_dir in entries if not is_dir]
    if any(path.name == ANALYSIS for path in files):
        return f"{root}: is the output of an analysis; give the run that was analyzed"
    below = [root / name for name, is_dir in entries if is_dir]
    nested = [f / name for f in below for name, is_dir in folders.entries(f) if not is_dir]
    for path in files + nested:
        if path.suffix in (*naming.PICKLED, ".distcp"):
            local = isinstance(root, Path)
            where = os.path.abspath(root) if isinstance(root, Path) else f"./{root.name}"
            words = f"{shlex.quote(where)} {shlex.quote(where + '-run')}"
            return (
                f"{root}: holds pickled checkpoints, which are never opened; "
                f"{'' if local else 'copy them here and '}convert them: lcray convert {words}"
            )
    if any(naming.is_weights(path.name) for path in files):
        return (
            f"{root}: no file name holds a step; a run is a directory of checkpoints named "
            "like step-10.safetensors or checkpoint-10/model.safetensors"
        )
    if runs := sorted({path.parent for path in nested if naming.is_weights(path.name)}):
        return f"{root}: no checkpoints, but {runs[0]} has some; give the directory of one run"
    return f"{root}: no checkpoints; record some with lcray.Recorder(model, directory)"
