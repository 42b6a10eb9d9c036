"""Places: local paths, and addresses on a file system that fsspec knows."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from lcray.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)")
_LOCAL = ("file", "local")
_REFUSED = ("simplecache", "filecache", "blockcache", "cached", "reference", "dir")


class Remote:
    """An object or a prefix on a file system that fsspec knows; behaves as a pure path.

    Args:
        protocol: as in the URI, without ``://``.
        path: the rest of the URI, without a slash at the end.
        size: bytes, if a listing has given them.
        stamp: a value that changes with the contents (etag, modification time), if known.
    """

    __slots__ = ("path", "protocol", "size", "stamp")

    def __init__(
        self, protocol: str, path: str, size: int | None = None, stamp: str | None = None
    ) -> None:
        self.protocol, self.path = protocol, path
        self.size, self.stamp = size, stamp

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: Remote) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | os.PathLike[str]) -> Remote:
        """A place below this one; a name that would lead elsewhere is a ValueError."""
        parts = os.fspath(name).split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{os.fspath(name)!r} is not a name below {self}")
        return Remote(self.protocol, "/".join([self.path, *parts]))

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The extension, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Remote:
        """The folder that it is in; the top is its own parent, as for any path."""
        above = self.path.rpartition("/")[0]
        return Remote(self.protocol, above) if above else self

    def with_name(self, name: str) -> Remote:
        """The place of that name in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> Remote:
        """The same place with another extension."""
        return self.with_name(str(PurePosixPath(self.name).with_suffix(suffix)))

    def resolve(self) -> Remote:
        """Itself: an address is absolute."""
        return self


Place = Path | Remote
PlaceLike = str | os.PathLike[str] | Remote


def place(where: PlaceLike) -> Place:
    """The place that a path or URI names; text without a scheme is a local path.

    Raises:
        UsageError: for a URI that leads nowhere, or that carries a password or a query, which
            would appear in records and messages.
    """
    if isinstance(where, Remote):
        return where
    text = os.fspath(where)
    match = _SCHEME.match(text)
    if match is None:
        return Path(text)
    protocol, rest = match[1].lower(), text[match.end() :]
    shown = f"{protocol}://{_without_secrets(rest)}"
    if protocol in _LOCAL:
        return Path(rest)
    if match[0].endswith("::") or "::" in rest or protocol in _REFUSED:
        raise UsageError(f"{shown}: chained addresses are not supported; give the plain URI")
    if shown != f"{protocol}://{rest}":
        raise UsageError(
            f"{shown}: addresses are recorded and must not contain passwords or queries; "
            "give credentials in the environment"
        )
    path = rest.strip("/")
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"{shown}: not an address; write it as {protocol}://bucket/folder")
    return Remote(protocol, path)


def _without_secrets(rest: str) -> str:
    """The text after the scheme, without query, fragment and ``user:password@``."""
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    user, at, host = rest.rpartition("@")
    # abfs://container@account is an address; a colon before the @ means a password, which may
    # contain slashes (AWS secrets do).
    return host if at and ":" in user else rest
