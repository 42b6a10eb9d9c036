"""Bitwise comparison of tensors: NaN equals the same NaN, and -0.0 differs from 0.0."""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor as integers of the same width, flat `[numel]`."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one device agree in shape, dtype and every bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(as_integers(a), as_integers(b))


def count_unchanged(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of two tensors of one shape and dtype have the same bits."""
    return int((as_integers(a) == as_integers(b)).sum())
