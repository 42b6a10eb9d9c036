"""The header of a safetensors file, checked before anything is allocated for its tensors.

The format: 8 bytes little-endian N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}`` with
an optional ``__metadata__`` of strings, then the data without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from lcray.storage.json_types import MAX_AXES

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
METADATA = "__metadata__"  # the only key that is not a tensor
CANONICAL_KEY = "lcray_names"  # in the metadata if names have no wrapper prefixes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, shape and byte range `[start, stop)` in the data part."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors and the strings of its ``__metadata__``."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def check_length(prefix: bytes, size: int) -> int:
    """The header's length N from the first 8 bytes of a file of `size` bytes.

    Raises:
        ValueError: fewer than 8 bytes, or a length that the file cannot hold.
    """
    if len(prefix) < 8:
        raise ValueError(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:8], "little")
    if length < 2 or length > min(MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes does not fit into {size} bytes")
    return length


@lru_cache(maxsize=4)  # the files of a run have the same header
def parse(text: bytes, data_size: int) -> Header:
    """The header in `text`, checked against the `data_size` bytes that follow it.

    Raises:
        ValueError: not JSON, unknown dtype, impossible shape, or byte ranges that overlap, leave
            holes or do not end with the file.
    """
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("the header is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the header is not JSON ({error.msg})") from error
    if not isinstance(raw, dict):
        raise ValueError("the header is not a JSON object")
    metadata = raw.pop(METADATA, None)
    metadata = {} if metadata is None else metadata  # as in the reference implementation
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    entries = {name: _entry(name, value) for name, value in raw.items()}
    _check_cover(entries, data_size)
    return Header(MappingProxyType(entries), MappingProxyType(metadata))


def build(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file: length and JSON, padded so that the data starts at 8 bytes."""
    raw: dict[str, Any] = {METADATA: dict(metadata)}
    for name, entry in entries.items():
        raw[name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_unicode(name: str) -> bool:
    """Whether a name is free of half surrogate pairs, which no file can hold."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def can_name(name: str) -> bool:
    """Whether a tensor in a file can have this name."""
    return name != METADATA and is_unicode(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header names a key twice")
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _overflows(shape: list[int]) -> bool:
    """Whether strides of such a shape exceed 64 bits, even if an axis of 0 makes it empty."""
    # Few axes, and none that is large itself: the product of a million axes is a huge number.
    if len(shape) > MAX_AXES or max(shape, default=0) >= 2**63:
        return True
    return math.prod(max(n, 1) for n in shape) >= 2**63


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"tensor {name!r} is not described by an object")
    if not is_unicode(name):
        raise ValueError(f"tensor {name!r} has a name that is not Unicode")
    code, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {code!r}")
    if not isinstance(shape, list) or not all(_whole(n) for n in shape) or _overflows(shape):
        raise ValueError(f"tensor {name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets):
        raise ValueError(f"tensor {name!r} has the impossible byte range {offsets!r}")
    entry = Entry(DTYPES[code], tuple(shape), offsets[0], offsets[1])
    if math.prod(shape) * entry.dtype.itemsize != entry.stop - entry.start:
        raise ValueError(f"tensor {name!r}: shape {shape} and byte range {offsets} disagree")
    return entry


def _check_cover(entries: Mapping[str, Entry], data_size: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"tensor {name!r} starts at byte {entry.start}, not at {end}")
        end = entry.stop
    if end != data_size:
        raise ValueError(f"the tensors need {end} bytes and the file holds {data_size}")
