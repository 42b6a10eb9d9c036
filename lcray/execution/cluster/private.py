"""The folder of lcray's own Ray: it is private, has a short path, and is removed afterwards.

Ray puts sockets into its folder, and the system limits the length of their paths. Ray opens that
folder to everybody, and keeps a token in the home folder, which may be read-only. So lcray's own
Ray gets a subfolder of a folder that only this user can enter, with its token beside it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lcray.errors import ClusterError

# Ray's part of the path of a socket: /ray/session_<date>_<time>_<microseconds>_<pid>/sockets/….
_OF_RAY = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
_OF_SYSTEM = 107 if sys.platform != "darwin" else 103
_PREFIX = "lcray-"
_LONGEST = _OF_SYSTEM - _OF_RAY - len(f"/{_PREFIX}12345678")  # bytes of the parent's path
_FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")


def make_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Make a folder that only this user can enter, with a path that is short enough.

    It is made in ``RAY_TMPDIR`` if that is set, else in the folder for temporary files, or in
    another one if the path of that folder is too long.

    Raises:
        ClusterError: if no folder can be made.
    """
    wanted = environment.get("RAY_TMPDIR")
    if wanted and len(os.fsencode(os.path.abspath(wanted))) > _LONGEST:
        raise ClusterError(
            f"RAY_TMPDIR {wanted!r}: paths of Ray's sockets in it would be too long; unset it, or "
            f"name a folder of at most {_LONGEST} bytes"
        )
    places = (wanted,) if wanted else (tempfile.gettempdir(), *_FALLBACKS)
    reason = ""
    for folder in map(os.path.abspath, places):
        if len(os.fsencode(folder)) > _LONGEST:
            continue
        try:
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            _write_token(made / "token")
        except OSError as error:
            reason = reason or f"{folder}: {error.strerror}"
        else:
            return made
    name = "RAY_TMPDIR" if wanted else "TMPDIR"
    raise ClusterError(
        f"Ray needs a folder for its sockets, and none can be made ({reason}); set {name} to a "
        f"folder that can be written to, of at most {_LONGEST} bytes"
    )


def remove(folder: Path | None) -> None:
    """Remove a private folder, if there is one, with all files that Ray has left in it."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def temporary(folder: Path) -> str:
    """The subfolder that Ray may open to everybody."""
    return str(folder / "ray")


def variables(folder: Path) -> dict[str, str]:
    """Environment variables that make Ray keep its token there, not in the home folder."""
    return {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}


def _write_token(path: Path) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
