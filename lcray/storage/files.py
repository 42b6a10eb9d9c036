"""Files that are whole or absent, and JSON that carries its own checksum.

Existence is not completeness: every file is written under a temporary or private name, synced, and
only then gets its final name. A file that names other files carries their checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lcray.errors import CorruptionError, OutputError
from lcray.storage import Place, Remote, cure, storage_of

P = TypeVar("P", Path, Remote, Place)

#: Version of plans, tables, shards and commits; readers refuse any other.
FORMAT_VERSION = 2

#: The file by which a run is recognized, and the one by which an output is.
RUN, ANALYSIS = "run.json", "analysis.json"

_JSON_LIMIT = 1 << 28  # bytes; analysis.json holds one checksum per checkpoint


_KEPT = "again: what is committed is kept"


@contextmanager
def writing(path: Place) -> Iterator[None]:
    """Turns an error of the operating system into an `OutputError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path}: cannot be written ({reason}); {cure(error, path)}, then run the same command "
            + ("again" if isinstance(error, FileNotFoundError) else _KEPT)
        ) from error


def make_folder(path: Place) -> None:
    """Makes a folder, with those above it, unless it exists; object stores have none.

    Raises:
        OutputError: if it cannot be made.
    """
    if isinstance(path, Path):
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


def exists(path: Place) -> bool:
    """Whether there is such a file.

    Raises:
        OutputError: if the storage gives no answer.
    """
    try:
        return storage_of(path).exists(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); check access") from error


def confined(root: P, path: P) -> P:
    """`path`, which is below `root` by its name, unless a link leads out of `root`.

    Raises:
        CorruptionError: if a link leads out of `root`.
    """
    if isinstance(path, Remote) or isinstance(root, Remote):  # object stores have no links
        return path
    if not _is_within(root, path):
        parts = path.relative_to(root).parts
        below = (root.joinpath(*parts[:n]) for n in range(1, len(parts)))
        link = next((each for each in below if not _is_within(root, each)), path)
        raise CorruptionError(
            f"{link}: a link leads out of {root}, and nothing outside is touched; put the real "
            "file or folder in its place"
        )
    return path


def _is_within(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def encode_json(data: Mapping[str, Any]) -> bytes:
    """The text of `data`, in the one form in which lcray writes JSON."""
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, preceded by a checksum of its own text."""
    return {"checksum": hashlib.sha256(encode_json(data)).hexdigest(), **data}


def write_json_atomic(path: Place, data: Mapping[str, Any], *, exclusive: bool = False) -> bool:
    """Writes a JSON object to `path`, whole or not at all.

    Args:
        path: the file; its folder is created.
        data: the object.
        exclusive: leave an existing file as it is.

    Returns:
        whether it was written; False only if `exclusive` and the file exists.

    Raises:
        OutputError: if it cannot be written.
    """
    text, storage = encode_json(data), storage_of(path)
    with writing(path):
        if exclusive:
            return storage.create(path, text)
        storage.write(path, text)
        return True


def read_json(path: Place) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        OutputError: if there is no such file or it cannot be read.
        CorruptionError: if it is not a JSON object of a sensible size.
    """
    return parse_json(path, read_whole(path))


def read_sealed(path: Place, size: int | None = None) -> dict[str, Any]:
    """The JSON object in `path`, without the checksum that `seal` put first.

    Args:
        path: the file.
        size: its bytes, if a listing has already given them.

    Raises:
        OutputError: if there is no such file or it cannot be read.
        CorruptionError: if it is not the object that was written, byte for byte.
    """
    text = read_whole(path, size)
    data = parse_json(path, text)
    checksum = data.pop("checksum", None)
    try:
        same = _sealed(checksum, text) and bool(_STRICT.encode(data).encode())
    except (ValueError, RecursionError):  # NaN, half a surrogate pair, depth: lcray writes none
        same = False
    if not same:
        raise CorruptionError(f"{path}: differs from its own checksum; {_REPAIR}")
    return data


_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _sealed(checksum: object, text: bytes) -> bool:
    """Whether `text` is what `seal` gave, compared as bytes: fast for 100,000 commits."""
    first = f'{{\n "checksum": "{checksum}",\n'.encode()
    rest = hashlib.sha256(b"{\n" + text[len(first) :]).hexdigest()
    return text.startswith(first) and rest == checksum


_REPAIR = "restore it, or remove its folder and run the same command again"


def _elsewhere(path: Place) -> str:
    """What to do if `path` is missing: the user may have meant an output just below its folder."""
    if isinstance(path, Path) and path.parent.is_file():
        return "an output is a folder: give the --out of an analysis"
    near = sorted(path.parent.glob(f"*/{path.name}")) if isinstance(path, Path) else []
    below = f" {near[0].parent} is one" if near else ""
    if not near and isinstance(path, Path) and (path.parent / RUN).exists():
        below = " it is a run: give the --out of its lcray analyze"
    return f"is this the output of an analysis?{below}"


def read_whole(path: Place, known: int | None = None) -> bytes:
    """What is in a file of a sensible size; `known` is its size, where a listing has said it.

    Raises:
        OutputError: if there is no such file or it cannot be read.
        CorruptionError: if it is too large.
    """
    storage = storage_of(path)
    try:
        size = storage.size(path) if known is None else known
        text = b"" if size > _JSON_LIMIT else storage.read(path, 0, known)
    except FileNotFoundError as error:
        raise OutputError(f"{path}: no such file; {_elsewhere(path)}") from error
    except OSError as error:
        hint = _elsewhere(path) if isinstance(error, NotADirectoryError) else "check access"
        raise OutputError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    if size > _JSON_LIMIT:
        raise CorruptionError(f"{path}: larger than {_JSON_LIMIT} bytes; {_REPAIR}")
    return text


def parse_json(path: Place, text: bytes) -> dict[str, Any]:
    """The JSON object in `text`, which was read from `path`.

    Raises:
        CorruptionError: if it is none.
    """
    try:
        data = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path}: not valid JSON; {_REPAIR}") from error
    if not isinstance(data, dict):
        raise CorruptionError(f"{path}: not a JSON object; {_REPAIR}")
    return data
