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
from lcray.checkpoints.recording import file_name
from lcray.checkpoints.series import Checkpoint, list_checkpoints, read_checkpoint
from lcray.checkpoints.snapshot import Contents, Layout, Slot, layout_of, snapshot
from lcray.errors import CheckpointError, RecorderError, UsageError
from lcray.storage import Remote, place

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MARK = "converted_from"  # in the metadata of run.json


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        steps: of the run's checkpoints that come from the source, ascending.
        written: how many of them were written now; the others had been before.
        layers: names of the tensors, in their order; tied ones once.
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
    """Turn saved checkpoints into a run: one safetensors file a step, and `run.json`.

    Sources are files of `torch.save` (``.pt``, ``.pth``, ``.bin``; Lightning's ``.ckpt``),
    directories that `torch.distributed.checkpoint` wrote, and directories of either. The step is
    the file's own ``global_step`` (or ``step``, ``iteration``), else the integer in its name. Every
    file appears whole or not at all; the same command goes on where it stopped; nothing is
    overwritten.

    Without `trust_pickle` nothing is unpickled but tensors, numbers and containers, by torch's
    restricted reader. What needs more is refused: unpickling can run any code in the file.

    Args:
        source: a checkpoint, or a directory of them.
        run: the directory of the run, made if missing.
        strip_prefix: keep only the tensors whose names begin so, such as ``"model."``, and take it
            off. Prefixes that wrappers add (``module.``, ``_orig_mod.``) go in any case.
        key: the entry of each file that holds the model. By default ``state_dict``,
            ``model_state_dict``, ``model`` or ``module``, or else the file itself.
        trust_pickle: unpickle what cannot be read otherwise, and run what is in it. Distributed
            checkpoints need it: their index is a pickle.
        progress: is told how many sources are done, and of how many.

    Raises:
        CheckpointError: nothing to convert, a source that cannot be read, needs trust or does not
            fit the others, or two of them of one step that differ.
        RecorderError: the run cannot be written, holds something else, or is in use.
        UsageError: the run is an address, or lies where the source is.
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
    """A run that checkpoints are added to."""

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
        """What `run.json` is to say, where the directory may be added to."""
        run, settings = self._directory.path, _settings(source)
        previous = runfile.load(run)
        if previous is None and any(run.iterdir()):
            raise RecorderError(f"{run}: is not empty; name a new directory for the run")
        if previous is not None:
            metadata = previous.get("metadata")
            if not isinstance(metadata, Mapping) or metadata.get(_MARK) != str(source.resolve()):
                raise RecorderError(
                    f"{run}: holds a run that is not of this source; name a new directory"
                )
            runfile.check_same_layers(run, previous, self._layout)
            self._had_ended = previous.get("ended") is True
        return runfile.describe(self._layout, settings, 0, None)

    def add(self, saved: Saved, path: Path) -> None:
        """Write one checkpoint, unless it is there."""
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
        """Say in `run.json`, before the first new checkpoint, that there will be more."""
        if not self._begun:
            self._directory.write(runfile.NAME, [runfile.encode(self._content)])
            self._begun = True

    def end(self) -> Conversion:
        """Say in `run.json` that all of it is there."""
        self._say_ended()
        return Conversion(tuple(sorted(self._seen)), self._written, tuple(self._layout.keys))

    def _say_ended(self) -> None:
        held = sorted(self._known)  # also those whose sources are gone by now
        every = min((after - before for before, after in pairwise(held)), default=1)
        self._content["sessions"][0] |= {"start": held[0], "every": every}
        ended = {**self._content, "every": every, "ended": True, "last_step": held[-1]}
        self._directory.write(runfile.NAME, [runfile.encode(ended)])
        self._begun = False

    def close(self) -> None:
        """Give the lock back; a run that had ended has not lost its end to a source that failed."""
        try:
            if self._begun and self._had_ended:
                with suppress(OSError):  # what went wrong before is what is told
                    self._say_ended()
        finally:
            self._directory.close()


def _settings(source: Path) -> dict[str, Any]:
    metadata = {_MARK: str(source.resolve())}
    return {"every": 1, "trainable_only": False, "task": None, "metadata": metadata}


def _layout(tensors: Mapping[str, Tensor], path: Path) -> Layout:
    """Names say which tensors are buffers: those of BatchNorm; a file does not."""
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
            return f"tensor {layer.name!r} is not as in the first checkpoint"
    missing = known.keys() - {layer.name for layer in new.layers}
    return f"tensor {min(missing)!r} is missing" if missing else "other tensors are tied"


def _holds(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return stored.keys() == wanted.keys() and all(same_bits(stored[n], wanted[n]) for n in wanted)
