"""What to do about a file that could not be written, by the system's error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_GONE = (errno.ENOENT, errno.ESTALE)


def cure(error: OSError, path: object = None) -> str:
    """A few words that say what to do, in the imperative.

    Args:
        error: the error of the write.
        path: the file that was to be written, if the error does not name it.
    """
    path = Path(error.filename) if isinstance(error.filename, str) else path
    if error.errno in _NO_ROOM:
        return "remove files, since no more can be made there" if _no_files(path) else "make room"
    if error.errno == errno.EFBIG:
        return "raise the limit of a file's size (ulimit -f)"
    if error.errno in _NO_ACCESS or isinstance(error, PermissionError):
        return "give access"
    if error.errno in _GONE or isinstance(error, FileNotFoundError):
        return "put its folder back"
    if error.errno == errno.ENOTDIR:
        return "move away the file that is where its folder should be"
    if error.errno == errno.EEXIST:
        return "move away what is in its place"
    if error.errno == errno.ELOOP:
        return "put a real file or folder in the place of the link"
    return "check the storage"


def _no_files(path: object) -> bool:
    """Whether a file system has free space but no free inodes, which gives the same error."""
    folder = path if isinstance(path, Path) else None
    while folder is not None and not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder) if folder is not None else None
    except OSError:
        return False
    return found is not None and found.f_files > 0 and found.f_favail == 0 and found.f_bavail > 0
