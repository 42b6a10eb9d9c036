"""Limits on the memory and disk that a file may take, in proportion to its own bytes.

torch's restricted reader runs no code, but a small file can make it allocate much memory: by
compressed entries, by views that repeat one number (strides of 0) or overlap, and by bytes that are
created from a count instead of read.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcray.errors import CheckpointError

_REPEATS = 4  # times the file: views of fused, sliced and transposed weights share memory
_FREE = 1 << 20  # bytes that views may repeat in any file, such as small masks
_TAIL = 98  # bytes at the end of a ZIP file: two ends of its index (one for large files), a pointer
_MADE = b"\nbytearray\n"  # a pickle's name for the function that makes n bytes from n


def check_file(path: Path, *, trust: bool) -> str | None:
    """Check a file of torch.save before it is read; returns the fault of a damaged archive, if any.

    Raises:
        CheckpointError: if its entries take more than the file, or (without `trust`) its pickle
            creates bytes that are not in the file.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
    if not zipped:
        if not trust and _holds(path, _MADE):
            raise _makes_bytes(path)
        return None
    try:
        if not _ends_as_usual(path):
            return "its index is not at its end"
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), path.stat().st_size
            taken = sum(entry.file_size for entry in entries)
            if taken > size:
                raise CheckpointError(
                    f"{path}: takes {taken:,} bytes unpacked, the file has {size:,}; torch.save "
                    "does not compress: unpack it, and zip it again without compression (zip -0)"
                )
            pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
            if not trust and any(_MADE in archive.read(entry) for entry in pickles):
                raise _makes_bytes(path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def _ends_as_usual(path: Path) -> bool:
    """Whether a ZIP file ends with its index and nothing else: then all readers find the same.

    Otherwise torch might read other entries than the entries that were checked here.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = file.read(_TAIL).rjust(_TAIL, b"\0")
    wide, pointer, end = tail[:56], tail[56:76], tail[76:]
    length, start = struct.unpack("<II", end[12:20])
    after = size - len(end)
    if pointer.startswith(b"PK\6\7"):
        length, start = struct.unpack("<QQ", wide[40:56])
        after = size - _TAIL
        if not wide.startswith(b"PK\6\6") or struct.unpack("<Q", pointer[8:16]) != (after,):
            return False
    return end.startswith(b"PK\5\6") and start + length == after


def _holds(path: Path, words: bytes) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(words) >= 0


def _makes_bytes(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds a bytearray, which may take more memory than the file; save its tensors "
        "alone, or pass --trust-pickle (trust_pickle=True) if you trust its author"
    )


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors do not take much more memory than the file that they come from.

    Args:
        path: the file.
        tensors: by name; a tensor that is stored once is one object, whatever its number of names.

    Raises:
        CheckpointError: if they take more.
    """
    distinct = {id(value): value for value in tensors.values()}.values()
    plain = [value for value in distinct if value.layout == torch.strided]
    taken = sum(value.numel() * value.element_size() for value in plain)
    size = path.stat().st_size
    if taken > _REPEATS * size + _FREE:
        raise CheckpointError(
            f"{path}: its tensors take {taken:,} bytes, the file has {size:,}, so they repeat "
            "the same numbers; save copies: {name: value.clone() for name, value in …}"
        )
