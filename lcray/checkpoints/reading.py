"""Reading one checkpoint: a single sequential pass over its files, straight into its tensors.

Nothing is ever unpickled or memory mapped, and nothing is read twice: this access pattern suits
both local disks and storage across a network. The bytes of a tensor go from the file to their final
memory; bytes that must be converted or rearranged pass through a small buffer.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO

import torch
from torch import Tensor

from lcray.checkpoints import header, naming
from lcray.errors import CheckpointError
from lcray.storage import ObjectReader, Place, Remote, current, open_binary

if sys.byteorder != "little":  # the format is, and its bytes are used as numbers unchanged
    raise ImportError("lcray reads checkpoints on little-endian machines only")

CHUNK = 1 << 20  # bytes read at a time: still in the cache when they are hashed and converted
_READ_AHEAD = 1 << 16  # bytes; saves one system call per small tensor
_CHANGED = "it changed while it was read"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its step, its file (or the index followed by its shards), and their size.

    `nbytes` is the size in the directory listing; `State.nbytes` is the number of bytes read.
    `stamp` changes when a file does: its size, and its modification time or etag; empty if unknown.
    """

    step: int
    files: tuple[Place, ...]
    nbytes: int
    stamp: str = ""


@dataclass(frozen=True)
class State:
    """The tensors of one checkpoint.

    Attributes:
        step: of the checkpoint.
        tensors: canonical name to CPU tensor in writable memory: the destination that the caller
            gave, or else a new tensor in the stored dtype.
        dtypes: canonical name to the dtype in the file.
        sha256: hexadecimal digest of the bytes of the files, in the order read.
        nbytes: bytes read.
        stamp: the stamp of the files when reading began; see `Checkpoint`.
    """

    step: int
    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    sha256: str
    nbytes: int
    stamp: str = ""


def read_checkpoint(checkpoint: Checkpoint, into: Mapping[str, Tensor] | None = None) -> State:
    """Read one checkpoint: its file, or its index and the shards that the index names.

    Args:
        checkpoint: the checkpoint.
        into: destinations by canonical name: CPU tensors of any strides, no two of which overlap.
            A stored tensor goes into its destination if the shapes are equal and its dtype can be
            cast to the destination's (`torch.can_cast`: not complex to real, not float to
            integer); it is converted as `Tensor.copy_` would. All others become new tensors.

    Raises:
        CheckpointError: a file is missing, torn or malformed, or changes in length while it is
            read. The content of the destinations is then undefined.
    """
    first, reading = checkpoint.files[0], _Reading(into or {})
    try:
        if first.name.endswith(naming.INDEX):
            reading.read_sharded(checkpoint.files)
        else:
            reading.read_single(first)
    except (ValueError, CheckpointError) as error:
        raise _unreadable(checkpoint, str(error)) from error
    except OSError as error:
        raise _unreadable(checkpoint, error.strerror or str(error)) from error
    except MemoryError as error:
        raise _unreadable(checkpoint, "it does not fit into memory") from error
    digest = reading.digest.hexdigest()
    stamp = joined(reading.stamps)
    return State(checkpoint.step, reading.tensors, reading.dtypes, digest, reading.nbytes, stamp)


def sha256_of_checkpoint(checkpoint: Checkpoint) -> str:
    """The value of `State.sha256`; a single file is hashed without loading its tensors.

    Raises:
        CheckpointError: as `read_checkpoint`, except for faults in the content of a single file.
    """
    if len(checkpoint.files) > 1:
        return read_checkpoint(checkpoint).sha256
    try:
        with _open(checkpoint.files[0]) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _unreadable(checkpoint, why) from error


def joined(stamps: Sequence[str]) -> str:
    """The stamp of a checkpoint, from its files' stamps in order; empty if one of them is empty."""
    if len(stamps) == 1 or not all(stamps):
        return stamps[0] if len(stamps) == 1 else ""
    return hashlib.sha256(",".join(stamps).encode()).hexdigest()[:32]


def stamp_of(file: Place, status: os.stat_result | None = None) -> str:
    """The stamp of a file, from its listing or its `status`; empty if they say too little."""
    if isinstance(file, Remote):
        return f"{file.size}-{file.stamp}" if file.size is not None and file.stamp else ""
    return "" if status is None else f"{status.st_size}-{status.st_mtime_ns}"


def _unreadable(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"step {checkpoint.step}, {checkpoint.files[0]}: cannot be read: {why}; "
        "save it again, or move it away or leave it out with --steps"
    )


class _Reading:
    """One pass over the files of a checkpoint, and its results so far."""

    def __init__(self, into: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.digest = hashlib.sha256()
        self.nbytes = 0
        self.stamps: list[str] = []
        self._into = into
        self._buffer: Tensor | None = None

    def read_single(self, path: Place) -> None:
        with self._opened(path) as file:
            found = self._header(file)
            canonical = found.metadata.get(header.CANONICAL_KEY) == "canonical"
            keys = found.entries
            names = {key: key for key in keys} if canonical else naming.canonical_names(keys)
            self._tensors(file, found.entries, names)

    def read_sharded(self, files: Sequence[Place]) -> None:
        index, known = files[0], {file.name: file for file in files}
        with self._opened(index) as file:
            text = file.read(header.MAX_HEADER + 1)
        if len(text) > header.MAX_HEADER:
            raise ValueError(f"the index is larger than {header.MAX_HEADER} bytes")
        self._count(text)
        weight_map = _weight_map(text)
        names = naming.canonical_names(weight_map)
        for name in sorted(set(weight_map.values())):
            keys = {key: names[key] for key, shard in weight_map.items() if shard == name}
            try:
                self._shard(known.get(name, index.parent / name), keys)
            except FileNotFoundError as error:
                raise ValueError(f"the shard {name} is missing") from error
            except ValueError as error:
                raise ValueError(f"in the shard {name}: {error}") from error
        self.tensors = {name: self.tensors[name] for name in names.values()}
        self.dtypes = {name: self.dtypes[name] for name in names.values()}

    def _shard(self, path: Place, names: Mapping[str, str]) -> None:
        with self._opened(path) as file:
            found = self._header(file)
            if differing := names.keys() ^ found.entries.keys():
                key = min(differing)
                raise CheckpointError(
                    f"the index and the shard {path.name} disagree about tensor {key!r}"
                )
            self._tensors(file, found.entries, names)

    @contextmanager
    def _opened(self, path: Place) -> Iterator[BufferedReader]:
        """Opens a file and keeps its stamp from before it is read; an object must not change it."""
        with _open(path) as file:
            remote = isinstance(path, Remote)
            self.stamps.append(stamp_of(path, None if remote else os.fstat(file.fileno())))
            yield file
            if isinstance(path, Remote) and isinstance(file.raw, ObjectReader):
                known = stamp_of(path)  # for an object, the cache has already checked it
                if known and known != stamp_of(current(path)):
                    raise ValueError(_CHANGED)

    def _header(self, file: BufferedReader) -> header.Header:
        size = _size(file)
        prefix = file.read(8)
        length = header.check_length(prefix, size)
        text = file.read(length)
        if len(text) != length:
            raise ValueError(_CHANGED)
        self._count(prefix)
        self._count(text)
        return header.parse(text, size - 8 - length)

    def _tensors(
        self, file: BufferedReader, entries: Mapping[str, header.Entry], names: Mapping[str, str]
    ) -> None:
        """The data part, in the order of the file; the tensors keep the order of the header."""
        for key, entry in entries.items():
            self.tensors[names[key]] = self._target(names[key], entry)
            self.dtypes[names[key]] = entry.dtype
        for key, entry in sorted(entries.items(), key=lambda item: item[1].start):
            self._fill(file, self.tensors[names[key]].detach(), entry.dtype)
        if file.read(1):
            raise ValueError(_CHANGED)

    def _target(self, name: str, entry: header.Entry) -> Tensor:
        given = self._into.get(name)
        if (
            given is not None
            and tuple(given.shape) == entry.shape
            and torch.can_cast(entry.dtype, given.dtype)
        ):
            return given
        try:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        except RuntimeError as error:  # the header's shapes are valid, so the allocator failed
            raise MemoryError from error

    def _fill(self, file: BufferedReader, target: Tensor, stored: torch.dtype) -> None:
        if not target.numel():
            return
        for piece in pieces(target, CHUNK // stored.itemsize):
            if piece.dtype == stored and piece.is_contiguous():
                self._take(file, piece)
            else:
                if self._buffer is None:
                    self._buffer = torch.empty(CHUNK, dtype=torch.uint8, device="cpu")
                passing = self._buffer[: piece.numel() * stored.itemsize]
                self._take(file, passing)
                piece.copy_(passing.view(stored).view(piece.shape))

    def _take(self, file: BufferedReader, memory: Tensor) -> None:
        """Reads the next bytes of the file into contiguous memory."""
        flat = memory.as_strided((memory.numel(),), (1,))  # one element may have any stride
        view = flat.view(torch.uint8).numpy().data
        if file.readinto(view) != len(view):
            raise ValueError(_CHANGED)
        self._count(view)

    def _count(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.nbytes += len(data)


def pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Views of at most `limit` elements that cover `tensor` row by row, in order.

    They are one-dimensional if `tensor` is contiguous. Otherwise they are whole rows along the
    first axis if rows are short enough, and pieces of single rows if they are not.
    """
    if tensor.numel() <= limit:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(limit)
    elif (width := tensor[0].numel()) <= limit:
        yield from tensor.split(limit // width)
    else:
        for row in tensor:
            yield from pieces(row, limit)


def _open(path: Place) -> BufferedReader:
    if isinstance(path, Remote):
        return open_binary(path, _READ_AHEAD)
    # Checked first: opening a named pipe would wait for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return BufferedReader(FileIO(path), _READ_AHEAD)


def _size(file: BufferedReader) -> int:
    if isinstance(file.raw, ObjectReader):
        return file.raw.size
    return os.fstat(file.fileno()).st_size


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
