"""Hostile documents: valid ones mutated at every level, and bytes that were never valid.

`LCRAY_FUZZ` is the number of inputs over all targets (5,000, and 100,000 in ``make fuzz``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lcray.errors import LcrayError
from lcray.storage.files import encode_json, seal

TOTAL = int(os.environ.get("LCRAY_FUZZ", "5000"))
SECONDS = 5  # that one input may take, on a machine that is busy with other things
LONGEST = 2100  # characters of a message


def inputs(share: float) -> settings:
    """Hypothesis settings for a target that gets this share of all inputs."""
    return settings(
        max_examples=max(1, round(share * TOTAL)),
        deadline=SECONDS * 1000,
        suppress_health_check=list(HealthCheck),
    )


class Raw(str):
    """JSON text to be put in as it is."""


#: What is put in the place of values. Paths lead to `outside` beside a run or an output.
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**60, 2**63, 2**64, -(2**63) - 1),
        *(Raw("1" + "0" * 400), Raw("1" * 5000), Raw("1e999"), Raw("-0"), Raw("01"), Raw("nul")),
        *(0.5, 1e308, -0.0, float("nan"), float("inf"), float("-inf")),
        *("", "a", "train", "F32", "float16", "parameter", "0", "2.5", "x" * 5000),
        *("../outside", "../../outside/x.safetensors", "/etc/passwd", "..", ".", "shards/.."),
        *("a\0b", "a\nb", "\x1b[2J", "\u202e", "\ud800", "1); SELECT 1 --", "{}", "%s"),
        *([], {}, [[]], [None], [0, 0], ["a", "a"], {"": None}, {"a": {"a": []}}, [1] * 70),
        *(Raw("[" * 900 + "]" * 900), Raw("[" * 100_000 + "]" * 100_000)),
        Raw('{"a":' * 50_000 + "1" + "}" * 50_000),
        Raw("[" + "9,9999999999999999999," * 3000 + "1]"),
    ]
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a document."""
    yield here
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(child, (*here, key))


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> Any:
    """`valid` after one to three mutations."""
    document = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(paths(document))))
        document = _mutate(draw, document, place)
    return document


def _mutate(draw: st.DrawFn, document: Any, place: tuple[Any, ...]) -> Any:
    if not place:
        return deepcopy(draw(VALUES)) if draw(st.integers(0, 9)) == 0 else document
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    how, key = draw(st.integers(0, 5)), place[-1]
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[draw(st.sampled_from(["", "x", "../x", "a\nb", "checksum", "__metadata__"]))] = 1
    elif how == 2 and isinstance(parent, dict):
        name = draw(st.sampled_from(["../x", "a\0b", "\ud800", "a\nb", "0", "borders", "fits"]))
        parent[name] = parent.pop(key)
    elif how == 3 and isinstance(parent, list):
        parent.append(deepcopy(parent[key]))
    elif how == 4 and isinstance(parent[key], int | float):
        parent[key] += draw(st.sampled_from([1, -1, 0.5, 2**60, -(2**60)]))
    else:
        parent[key] = deepcopy(draw(VALUES))
    return document


def text_of(value: Any) -> str:
    """JSON text, with `Raw` and non-finite numbers as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{text_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` truncated, with bits flipped, bytes replaced, inserted, repeated or taken out."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if draw(st.booleans()):  # the ends hold lengths, footers and magic numbers
            at = max(0, len(data) - 1 - at % 400)
        how = draw(st.integers(0, 5))
        if how == 0:
            del data[at:]
        elif how == 1 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 2:
            new = draw(st.binary(min_size=1, max_size=9))
            data[at : at + len(new)] = new
        elif how == 3:
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif how == 4:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def json_files(draw: st.DrawFn, valid: Any, *, sealed: bool = False) -> bytes:
    """The bytes of a JSON file: mutated as a document, as text, or never valid."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    document = valid if kind == 1 else draw(documents(valid))
    text = text_of(document).encode("utf-8", "surrogatepass")
    if sealed and draw(st.integers(0, 9)):  # whoever writes hostile files knows the checksum
        text = _sealed(document, text)
    if kind == 2 and text.startswith(b"{") and text.endswith(b"}"):  # every key twice
        return text[:-1] + b"," + text[1:]
    return draw(damaged(text)) if kind in (1, 3) else text


def _sealed(document: Any, text: bytes) -> bytes:
    try:
        parsed = json.loads(text)
        parsed.pop("checksum", None)
        return encode_json(seal(parsed))
    except (AttributeError, TypeError, ValueError, RecursionError):  # no object, no checksum
        return text


def survives(call: Callable[[], object]) -> bool:
    """Whether `call` works; if not it raises an error of lcray's, of one line, and nothing else."""
    try:
        call()
    except LcrayError as error:
        is_line(str(error))
        return False
    return True


def is_line(message: str) -> None:
    assert message and len(message) <= LONGEST
    assert not any(c in message for c in "\n\r\0\x1b\u2028\ud800")


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """`path` with other content while the block lasts."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


_opened: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(str(arguments[0]))


@contextmanager
def nothing_outside(folder: Path) -> Iterator[None]:
    """Nothing under `folder`, and no file of users, is opened while the block lasts."""
    global _watching
    if not _opened:
        sys.addaudithook(_hook)
        _opened.append("")
    content = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    _opened[1:] = []
    _watching = True
    try:
        yield
    finally:
        _watching = False
    real = [os.path.realpath(name) for name in _opened if "\0" not in name]
    inside = os.path.realpath(folder)
    assert [name for name in real if name.startswith((inside, "/etc/passwd"))] == []
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == content
