"""Vectors with an element for each of the model's, whose memory is theirs alone.

Such a vector is as large as the model, and a worker has a good dozen. From the heap, blocks that
were let go would serve smaller requests in the meantime, and the process would grow by half. So on
the CPU each has a mapping of its own, which goes back to the system with the vector.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

_LEAST = 1 << 20  # bytes: below, the heap serves as well


def zeros(size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A vector of zeros, [size]."""
    nbytes = size * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < _LEAST:
        return torch.zeros(size, dtype=dtype, device=device)
    # Private: a child that a process forks must not write into its parent's vectors.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    return torch.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=dtype, count=size)


def release() -> None:
    """Give free memory of the heap back to the system, where that is glibc's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
