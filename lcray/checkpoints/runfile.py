"""`run.json`: the recorder's description of a run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lcray.checkpoints.snapshot import Layout
from lcray.errors import RecorderError
from lcray.storage.files import RUN

NAME = RUN
FORMAT_VERSION = 1
_LIMIT = 1 << 28  # bytes


def load(root: Path) -> dict[str, Any] | None:
    """The content of a run's `run.json`, or None if there is none.

    Raises:
        RecorderError: the file is not a `run.json` of this version.
    """
    path = root / NAME
    try:
        content = json.loads(_read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RecorderError(f"{path}: cannot be read; move it away to resume") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise RecorderError(
            f"{path}: format_version is {version!r}, not {FORMAT_VERSION}; use a new directory"
        )
    if not isinstance(content.get("sessions", []), list):
        raise RecorderError(f"{path}: has no list of sessions; use a new directory")
    return dict(content)


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        text = file.read(_LIMIT + 1)
    if len(text) > _LIMIT:
        raise ValueError(f"larger than {_LIMIT} bytes")
    return text


def describe(
    layout: Layout, settings: Mapping[str, Any], start: int, previous: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content for a session that begins at `start`, after the sessions of `previous`."""
    session = {"start": start, "every": settings["every"], "versions": _versions()}
    return {
        "format_version": FORMAT_VERSION,
        "ended": False,
        **settings,
        "layers": [asdict(layer) for layer in layout.layers],
        "aliases": dict(layout.aliases),
        "sessions": [*(previous or {}).get("sessions", []), session],
    }


def check_same_layers(root: Path, content: Mapping[str, Any], layout: Layout) -> None:
    """Refuse to append a different model to a run.

    Raises:
        RecorderError: naming the first tensor whose name, shape or dtype differs.
    """
    try:
        old = {x["name"]: (list(x["shape"]), str(x["dtype"])) for x in content["layers"]}
    except (KeyError, TypeError) as error:
        raise RecorderError(f"{root / NAME}: has no list of layers; use a new directory") from error
    new = {layer.name: (list(layer.shape), layer.dtype) for layer in layout.layers}
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            raise RecorderError(
                f"{root}: tensor {name!r} is {_show(old.get(name))} in the run and "
                f"{_show(new.get(name))} in the model; use a new directory"
            )


def encode(content: Mapping[str, Any]) -> bytes:
    """The bytes of the file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def _show(described: tuple[list[int], str] | None) -> str:
    return "absent" if described is None else f"{described[1]} {described[0]}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("lcray", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found
