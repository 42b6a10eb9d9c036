"""Retries for a storage across a network: bounded, with errors in one line."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lcray.errors import UsageError

T = TypeVar("T")

PATIENCE = 90.0  # seconds, unless LCRAY_STORAGE_PATIENCE is set
_FIRST, _LONGEST = 0.2, 8.0  # seconds between two tries
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
    ImportError,
)
_FINAL_NUMBERS = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOSPC)
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})
#: S3's messages for a body that did not arrive whole, although the request was valid.
_AGAIN = ("IncompleteBody", "BadDigest", "RequestTimeout", "XAmzContentSHA256Mismatch")
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS|CONNECTION_STRING", re.I)
_LEAST_SECRET = 6  # characters; shorter values would blank out words


class Changed(OSError):
    """The object is no longer the one that was listed."""


def positive_setting(name: str, default: float) -> float:
    """A number from the environment.

    Raises:
        UsageError: if it is not a number, or negative.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name}={text!r}: must be a number, 0 or more")
    return value


def persistently(what: Callable[[], T]) -> T:
    """The result of `what`, tried again while the storage is busy or cannot be reached.

    Waits double from 0.2 s to 8 s, each with a random factor, so that many workers spread out.

    Args:
        what: the operation; repeating it must do no harm.

    Raises:
        OSError: of the fitting kind, in one line; at once for a final error, else after
            ``LCRAY_STORAGE_PATIENCE`` seconds, `PATIENCE` by default.
        UsageError: if that variable is not a number.
    """
    end = time.monotonic() + positive_setting("LCRAY_STORAGE_PATIENCE", PATIENCE)
    wait = _FIRST
    while True:
        try:
            return what()
        except Exception as error:
            left = end - time.monotonic()
            if _is_final(error) or left <= 0:
                raise _plain(error) from error
        time.sleep(min(left, wait * random.uniform(0.5, 1.0)))
        wait = min(2 * wait, _LONGEST)


def code_of(error: BaseException) -> str:
    """The code that S3 gave an error, or an empty string."""
    for found in (error, error.__cause__):
        response: Any = getattr(found, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _is_final(error: Exception) -> bool:
    if isinstance(error, Changed):
        return True
    if code_of(error) in _AGAIN:
        return False
    kinds = _kinds(error)
    if kinds & _NO_CREDENTIALS or "ParamValidationError" in kinds:
        return True
    return isinstance(error, _FINAL) or getattr(error, "errno", None) in _FINAL_NUMBERS


def _kinds(error: Exception) -> set[str]:
    return {type(found).__name__ for found in (error, error.__cause__)}


def _plain(error: Exception) -> OSError:
    """The error as an `OSError` with one line and no secrets."""
    kind = next((kind for kind in _PLAIN if type(error) is kind), OSError)
    if _kinds(error) & _NO_CREDENTIALS:
        return PermissionError(errno.EACCES, "no credentials: set them in the environment")
    number = getattr(error, "errno", None) or _PLAIN.get(kind, errno.EIO)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if kind is FileNotFoundError:
        text = "no such object or bucket"
    elif isinstance(error, ImportError):
        text = f"a package is missing ({text})"
    return kind(number, without_secrets(" ".join(str(text).split())))


_PLAIN: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    Changed: errno.ESTALE,
}


def without_secrets(text: str) -> str:
    """`text` in at most 200 characters, without queries, passwords and values of secret variables.

    An environment variable is secret if its name says so: KEY, SECRET, TOKEN, …
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET:
            text = text.replace(value, "***")
    text = re.sub(r"(\w://\S*?)\?[^\s'\")]*", r"\1", text)
    text = re.sub(r"(\w://)[^\s@]*:[^\s@]*@", r"\1", text)
    return text[:200]
