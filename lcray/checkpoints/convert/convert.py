"""The verb `convert`: checkpoints of torch.save and of torch.distributed become a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from lcray.checkpoints import runfile
from lcray.checkpoints.bits import same_bits
from lcray.checkpoints.convert.opening import Saved, read_source
from lcray.checkpoints.convert.sources import find_sources
from lcray.checkpoints.directory import LockedDirectory
from lcray.checkpoints.reading import Checkpoint, read_checkpoint
from lcray.checkpoints.recording import file_name
from lcray.checkpoints.series import list_checkpoints
from lcray.checkpoints.snapshot import Contents, Layout, Slot, layout_of, snapshot
from lcray.errors import CheckpointError, RecorderError, UsageError
from lcray.storage import Remote, place

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MARK = "converted_from"  # in the metadata of run.json


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        steps: the run's checkpoints that come from the source, ascending.
        written: how many of them were written now; the others existed already.
        layers: names of the tensors, in the model's order; a tied tensor once.
    """

    steps: tuple[int, ...]
    written: int
    layers: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    strip_prefix: str = "",
    key: str | None = None,
    trust_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Turn saved checkpoints into a run: one safetensors file per step, and `run.json`.

    Sources are files of `torch.save` (``.pt``, ``.pth``, ``.bin``; Lightning's ``.ckpt``),
    directories that `torch.distributed.checkpoint` wrote, and directories of either. The step is
    the file's own ``global_step`` (or ``step``, ``iteration``), else the integer in its name. Every
    file appears whole or not at all. After an interruption, the same command goes on where it
    stopped. Nothing is overwritten.

    Without `trust_pickle`, torch's restricted reader unpickles tensors, numbers and containers
    only. A file that needs more is refused, since unpickling can run any code in the file.

    Args:
        source: a checkpoint, or a directory of them.
        run: the directory of the run, created if missing.
        strip_prefix: keep only the tensors whose names begin with it, such as ``"model."``, and
            remove it from their names. Prefixes that wrappers add (``module.``, ``_orig_mod.``) are
            always removed.
        key: the entry of each file that holds the model. By default ``state_dict``,
            ``model_state_dict``, ``model`` or ``module``, or else the file itself.
        trust_pickle: unpickle files that cannot be read otherwise, which runs the code in them.
            Distributed checkpoints need it: their index is a pickle.
        progress: called with the number of sources done and the number of all sources.

    Raises:
        CheckpointError: there is nothing to convert; a source cannot be read, needs trust or does
            not fit the others; or two sources of the same step differ.
        RecorderError: the run cannot be written, holds something else, or is in use.
        UsageError: the run is a URI, or is the source itself.
    """
    root, target = Path(source), place(run)
    if isinstance(target, Remote):
        raise UsageError(f"{target}: a run is written to a local path; copy it afterwards")
    if target.resolve() == root.resolve():
        raise UsageError(f"{target}: is the source itself; name another directory for the run")
    sources = find_sources(root)
    writing: _Writing | None = None
    try:
        for number, each in enumerate(sources):
            saved = read_source(each, key=key, prefix=strip_prefix, trust=trust_pickle)
            writing = writing or _Writing(target, root, saved, each.path)
            writing.add(saved, each.path)
            if progress is not None:
                progress(number + 1, len(sources))
        assert writing is not None  # there is a source
        return writing.end()
    finally:
        if writing is not None:
            writing.close()


class _Writing:
    """A run to which checkpoints are added."""

    def __init__(self, run: Path, source: Path, first: Saved, path: Path) -> None:
        self._layout = _layout(first.tensors, path)
        self._slot = Slot(self._layout)
        self._seen: dict[int, Path] = {}
        self._written = 0
        self._had_ended = self._begun = False
        self._directory = LockedDirectory(run)
        try:
            self._content = self._check(source)
            self._known = {each.step: each for each in list_checkpoints(run)}
        except BaseException:
            self._directory.close()
            raise

    def _check(self, source: Path) -> dict[str, Any]:
        """The content of `run.json`, if checkpoints may be added to the directory."""
        run, settings = self._directory.path, _settings(source)
        previous = runfile.load(run)
        if previous is None and any(run.iterdir()):
            raise RecorderError(f"{run}: not empty; name a new directory for the run")
        if previous is not None:
            metadata = previous.get("metadata")
            if not isinstance(metadata, Mapping) or metadata.get(_MARK) != str(source.resolve()):
                raise RecorderError(f"{run}: holds a run from another source; name a new directory")
            runfile.check_same_layers(run, previous, self._layout)
            self._had_ended = previous.get("ended") is True
        return runfile.describe(self._layout, settings, 0, None)

    def add(self, saved: Saved, path: Path) -> None:
        """Write one checkpoint, unless it exists."""
        layout = _layout(saved.tensors, path)
        if _signature(layout) != _signature(self._layout):
            raise CheckpointError(
                f"{path}: {_difference(layout, self._layout)}; convert models of different form "
                "into different runs"
            )
        snapshot(self._layout, saved.tensors, self._slot)
        known = self._known.get(saved.step)
        if known is None:
            self._begin()
            chunks: list[bytes | memoryview] = [self._layout.head, self._slot.memory]
            self._directory.write(file_name(saved.step), chunks)
            self._written += 1
            path_written = self._directory.path / file_name(saved.step)
            size = len(self._layout.head) + self._layout.nbytes
            self._known[saved.step] = Checkpoint(saved.step, (path_written,), size)
        elif not _holds(read_checkpoint(known).tensors, self._slot.views):
            other = self._seen.get(saved.step, known.files[0])
            raise CheckpointError(f"{path}: and {other} are both step {saved.step}, and differ")
        self._seen[saved.step] = path

    def _begin(self) -> None:
        """Note in `run.json`, before the first new checkpoint, that more will come."""
        if not self._begun:
            self._directory.write(runfile.NAME, [runfile.encode(self._content)])
            self._begun = True

    def end(self) -> Conversion:
        """Note in `run.json` that the run is complete."""
        self._say_ended()
        return Conversion(tuple(sorted(self._seen)), self._written, tuple(self._layout.keys))

    def _say_ended(self) -> None:
        held = sorted(self._known)  # also steps whose sources have been removed since
        every = min((after - before for before, after in pairwise(held)), default=1)
        self._content["sessions"][0] |= {"start": held[0], "every": every}
        ended = {**self._content, "every": every, "ended": True, "last_step": held[-1]}
        self._directory.write(runfile.NAME, [runfile.encode(ended)])
        self._begun = False

    def close(self) -> None:
        """Release the lock; a source that failed does not make a complete run incomplete."""
        try:
            if self._begun and self._had_ended:
                with suppress(OSError):  # the earlier error is the one to report
                    self._say_ended()
        finally:
            self._directory.close()


def _settings(source: Path) -> dict[str, Any]:
    metadata = {_MARK: str(source.resolve())}
    return {"every": 1, "trainable_only": False, "task": None, "metadata": metadata}


def _layout(tensors: Mapping[str, Tensor], path: Path) -> Layout:
    """The layout; buffers are recognised by BatchNorm's names, since a file does not mark them."""
    buffers = {name for name in tensors if name.rpartition(".")[2] in _BUFFERS}
    everything = frozenset(tensors)
    try:
        return layout_of(Contents(tensors, everything - buffers, everything))
    except RecorderError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _signature(layout: Layout) -> list[tuple[Any, ...]]:
    layers = sorted((x.name, x.shape, x.dtype) for x in layout.layers)
    return [*layers, *sorted(layout.aliases.items())]


def _difference(new: Layout, old: Layout) -> str:
    known = {layer.name: layer for layer in old.layers}
    for layer in new.layers:
        if known.get(layer.name) != layer:
            return f"tensor {layer.name!r} differs from the first checkpoint"
    missing = known.keys() - {layer.name for layer in new.layers}
    return f"tensor {min(missing)!r} is missing" if missing else "other tensors are tied"


def _holds(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return stored.keys() == wanted.keys() and all(same_bits(stored[n], wanted[n]) for n in wanted)
