"""A run on disk: its checkpoints in numeric order, and reading one of them.

Nothing is ever unpickled, and a file is read as a whole, sequentially, without memory mapping:
the same access pattern is right for local disks and for storage across a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from lcray.checkpoints import header, naming
from lcray.errors import CheckpointError, UsageError

# Within one checkpoint folder, in the order in which `from_pretrained` looks for them.
_MODEL_FILES = (
    "model" + naming.SAFETENSORS,
    "model" + naming.INDEX,
    "adapter_model" + naming.SAFETENSORS,
)
CANONICAL_KEY = "lcray_names"  # header metadata: the names are already without wrapper prefixes


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its step, its file (or the index followed by its shards), and their size.

    `nbytes` is what the directory listing said; `State.nbytes` is what was read.
    """

    step: int
    files: tuple[Path, ...]
    nbytes: int


@dataclass(frozen=True)
class State:
    """The tensors of one checkpoint.

    Attributes:
        step: the step it was taken at.
        tensors: canonical name to CPU tensor, in its stored dtype and in writable memory.
        sha256: hexadecimal digest of the bytes of the files, in the order read.
        nbytes: bytes read.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class CheckpointSeries:
    """The checkpoints of one run, sorted by step as a number (9000 before 10000)."""

    root: Path
    checkpoints: tuple[Checkpoint, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps, ascending."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of `step`; raises CheckpointError where there is none."""
        for checkpoint in self.checkpoints:
            if checkpoint.step == step:
                return checkpoint
        raise CheckpointError(
            f"{self.root}: no checkpoint of step {step}; "
            f"there are {len(self.checkpoints)}, from {self.steps[:1]} to {self.steps[-1:]}"
        )

    def read(self, step: int) -> State:
        """Read the checkpoint of `step` as a whole.

        Raises:
            CheckpointError: no such step, or a file that is missing, torn or malformed.
        """
        return read_checkpoint(self.checkpoint(step))


def open_series(run: str | Path, steps: str | None = None, *, minimum: int = 2) -> CheckpointSeries:
    """Find the checkpoints of a run.

    Any naming with one integer works: ``step-00000010.safetensors``, ``model_step10.safetensors``,
    ``checkpoint-500/model.safetensors`` (single, sharded or an adapter).

    Args:
        run: a local directory.
        steps: ``"a:b"`` keeps the checkpoints with a <= step <= b; either side may be empty.
        minimum: how many checkpoints there must be.

    Raises:
        CheckpointError: missing or empty run, too few checkpoints, only pickled files, or two
            checkpoints of one step.
        UsageError: `steps` that is no range.
    """
    if "://" in str(run):
        raise CheckpointError(f"{run}: this version reads local paths only; copy the run first")
    root = Path(run)
    keep = _parse_range(steps)
    found = list_checkpoints(root)
    if not found:
        raise CheckpointError(_why_empty(root))
    kept = tuple(checkpoint for checkpoint in found if keep(checkpoint.step))
    if len(kept) < minimum:
        chosen = f" with steps in {steps!r}" if steps is not None else ""
        raise CheckpointError(
            f"{root}: {len(kept)} checkpoint(s){chosen} of {len(found)} "
            f"(steps {found[0].step} to {found[-1].step}), and at least {minimum} are needed"
        )
    return CheckpointSeries(root, kept)


def list_checkpoints(root: Path) -> tuple[Checkpoint, ...]:
    """Every checkpoint in a directory, by step; empty where there is none.

    Raises:
        CheckpointError: no such directory, or two checkpoints of one step.
    """
    found: dict[int, Checkpoint] = {}
    for entry, is_dir in _entries(root):
        files = _in_folder(entry) if is_dir else _flat(entry)
        step = naming.parse_step(entry.name) if files else None
        if step is None:
            continue
        if step in found:
            raise CheckpointError(
                f"{root}: {found[step].files[0].relative_to(root)} and "
                f"{files[0].relative_to(root)} are both step {step}; move one of them away"
            )
        if step >= 2**63:
            raise CheckpointError(f"{root}: {entry.name} is step {step}; steps end at 2**63")
        found[step] = Checkpoint(step, files, sum(_size(file) for file in files))
    return tuple(found[step] for step in sorted(found))


def read_checkpoint(checkpoint: Checkpoint) -> State:
    """Read one checkpoint: its file, or its index and the shards that this names.

    Raises:
        CheckpointError: a file that is missing, torn or malformed.
    """
    first = checkpoint.files[0]
    try:
        if first.name.endswith(naming.INDEX):
            blobs, tensors, canonical = _read_sharded(first)
        else:
            blob, tensors, canonical = _read_file(first)
            blobs = [blob]
        names = {key: key for key in tensors} if canonical else naming.canonical_names(tensors)
    except (ValueError, CheckpointError) as error:
        raise _unreadable(checkpoint, str(error)) from error
    except OSError as error:
        raise _unreadable(checkpoint, error.strerror or str(error)) from error
    except MemoryError as error:
        raise _unreadable(checkpoint, "it does not fit into memory") from error
    digest = hashlib.sha256()
    for blob in blobs:
        digest.update(blob)
    renamed = {names[key]: tensor for key, tensor in tensors.items()}
    return State(checkpoint.step, renamed, digest.hexdigest(), sum(map(len, blobs)))


def _unreadable(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"step {checkpoint.step}, {checkpoint.files[0]}: cannot be read: {why}; "
        "save it again, or move it away or leave it out with --steps"
    )


def _parse_range(steps: str | None) -> Callable[[int], bool]:
    if steps is None:
        return lambda step: True
    parts = [part.strip() for part in steps.split(":")]
    if len(parts) != 2 or not all(part == "" or part.isdecimal() for part in parts):
        raise UsageError(f"steps {steps!r}: write a:b, two steps of which either may be left out")
    low = int(parts[0]) if parts[0] else 0
    high = int(parts[1]) if parts[1] else None
    return lambda step: low <= step and (high is None or step <= high)


def _entries(root: Path) -> list[tuple[Path, bool]]:
    """The entries of a directory that may be checkpoints, by name, and whether each is a folder."""
    try:
        with os.scandir(root) as scan:
            found = [
                (Path(entry.path), entry.is_dir())
                for entry in scan
                if not naming.is_ignored(entry.name)
            ]
    except FileNotFoundError as error:
        raise CheckpointError(f"{root}: no such run; give the directory of checkpoints") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{root}: a run is a directory, and this is a file") from error
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed: {error.strerror}") from error
    return sorted(found)


def _flat(path: Path) -> tuple[Path, ...]:
    if not naming.is_weights(path.name):
        return ()
    return _with_shards(path)


def _in_folder(folder: Path) -> tuple[Path, ...]:
    """The model in a checkpoint folder, or nothing (folders of logs are no checkpoints)."""
    if not any(character.isdigit() for character in folder.name):
        return ()
    if folder.name.endswith(naming.SAFETENSORS):
        return (folder,)  # listed, so that reading it reports what is wrong
    names = [path.name for path, is_dir in _entries(folder) if not is_dir]
    for name in _MODEL_FILES:
        if name in names:
            return _with_shards(folder / name)
    others = [name for name in names if naming.is_weights(name)]
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: cannot tell which of {', '.join(others)} is the model; "
            "name it model.safetensors"
        )
    return _with_shards(folder / others[0]) if others else ()


def _with_shards(path: Path) -> tuple[Path, ...]:
    if not path.name.endswith(naming.INDEX):
        return (path,)
    names = sorted(
        p.name for p, _ in _entries(path.parent) if naming.is_shard_of(p.name, path.name)
    )
    return (path, *(path.parent / name for name in names))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link: reading it reports what is wrong
        return 0


def _why_empty(root: Path) -> str:
    entries = _entries(root)
    nested = [
        (p, False) for folder, is_dir in entries if is_dir for p, d in _entries(folder) if not d
    ]
    for path, is_dir in entries + nested:
        if not is_dir and path.suffix in naming.PICKLED:
            target = path.with_suffix(naming.SAFETENSORS)
            return (
                f"{root}: holds pickled checkpoints, which are never opened; convert each: "
                'python -c "import sys, torch, safetensors.torch as s; '
                's.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
                f"{shlex.quote(str(path))} {shlex.quote(str(target))}"
            )
    if any(naming.is_weights(path.name) for path, is_dir in entries if not is_dir):
        return (
            f"{root}: no file name holds a step; a run is a directory of checkpoints named "
            "like step-10.safetensors or checkpoint-10/model.safetensors"
        )
    return f"{root}: no checkpoints; record some with lcray.Recorder(model, directory)"


def _read_whole(path: Path) -> bytes:
    # Checked first: opening a named pipe would wait for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return path.read_bytes()


def _read_file(path: Path) -> tuple[bytes, dict[str, torch.Tensor], bool]:
    """One safetensors file: its bytes, its tensors, and whether its names are canonical."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = header.check_length(prefix, size)
        checked = header.parse(file.read(length), size - 8 - length)
        file.seek(0)
        data = file.read()
    if len(data) != size:
        raise ValueError("it changed while it was read")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the loader raises whatever its parts raise
        raise ValueError(f"safetensors refuses it ({error})") from error
    # The loader's order is a hash map's; the header's is the same every time.
    tensors = {name: tensors[name] for name in checked.entries}
    return data, tensors, checked.metadata.get(CANONICAL_KEY) == "canonical"


def _read_sharded(index: Path) -> tuple[list[bytes], dict[str, torch.Tensor], bool]:
    text = _read_whole(index)
    weight_map = _weight_map(text)
    blobs, tensors = [text], dict[str, torch.Tensor]()
    for name in sorted(set(weight_map.values())):
        try:
            blob, shard, _ = _read_file(index.parent / name)
        except FileNotFoundError as error:
            raise ValueError(f"the shard {name} is missing") from error
        except ValueError as error:
            raise ValueError(f"in the shard {name}: {error}") from error
        wanted = {key for key, file in weight_map.items() if file == name}
        if wanted != set(shard):
            key = sorted(wanted ^ set(shard))[0]
            raise ValueError(f"the index and the shard {name} disagree about tensor {key!r}")
        blobs.append(blob)
        tensors.update(shard)
    return blobs, {key: tensors[key] for key in weight_map}, False


def _weight_map(text: bytes) -> dict[str, str]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("the index is not JSON") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("the index has no weight_map")
    for key, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not name.endswith(naming.SAFETENSORS)
            or (name != os.path.basename(name) or "\\" in name or "\0" in name)
        ):
            raise ValueError(f"the index puts tensor {key!r} into {name!r}, not a file beside it")
    return weight_map
