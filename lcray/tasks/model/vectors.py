"""Vectors with one element per element of the model, in memory that the system gets back.

Such a vector is as large as the model, and a worker has more than twelve. On the heap, freed blocks
would serve smaller requests in the meantime, and the process would grow by half. So on the CPU each
vector has a memory mapping of its own, which is returned to the system with the vector.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

_LEAST = 1 << 20  # bytes: the heap is good enough for smaller vectors


def zeros(size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A vector of zeros, [size]."""
    nbytes = size * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < _LEAST:
        return torch.zeros(size, dtype=dtype, device=device)
    # Private: a child that a process forks must not write into its parent's vectors.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    return torch.frombuffer(mmap.mmap(-1, nbytes, **private), dtype=dtype, count=size)


def release() -> None:
    """Return free memory of the heap to the system, if the C library is glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
