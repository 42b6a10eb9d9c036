"""Operations on blocks and their pieces: bits, and sums and counts by piece.

Legend: n elements of a block, in m pieces; Q quantities.

On a CPU, NumPy works in the memory of the tensors: its operations on bytes are two to five times as
fast, and it sums many short pieces in one call. Elsewhere one call of torch sums a piece. There are
no atomic additions, so sums depend on the data alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: A tensor, or the array of its memory on a CPU.
Array = Any


class NumpyBits:
    """Operations on arrays, which have the same names and arguments in torch."""

    add, less, greater = np.add, np.less, np.greater
    bitwise_xor, bitwise_and = np.bitwise_xor, np.bitwise_and
    bitwise_right_shift = np.right_shift


def module_of(device: torch.device) -> Any:
    """The module with the operations on what `array_of` gives."""
    return NumpyBits if device.type == "cpu" else torch


def array_of(tensor: Tensor) -> Array:
    """`tensor`, as an array if it is on a CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def sum_pieces(values: Tensor, starts: Sequence[int], out: Tensor) -> None:
    """Sum values [Q, n] float64 over each piece into `out` [Q, m].

    Args:
        values: the values.
        starts: where each piece starts, ascending from 0.
        out: the sums.
    """
    if len(starts) == 1:
        torch.sum(values, 1, out=out[:, 0])
    elif values.device.type == "cpu":
        with np.errstate(over="ignore", invalid="ignore"):
            np.add.reduceat(values.numpy(), starts, axis=1, out=out.numpy())
    else:
        sum_one_by_one(values, starts, out)


def count_pieces(bits: Tensor, starts: Sequence[int], out: Tensor) -> None:
    """Count the ones among zeros and ones, [Q, n] uint8, in each piece, into `out` [Q, m] int64."""
    if bits.device.type != "cpu":
        sum_one_by_one(bits, starts, out)
        return
    edges, found = (*starts, bits.shape[1]), []
    for row in bits.view(torch.bool).numpy():
        found.append([np.count_nonzero(row[a:b]) for a, b in pairwise(edges)])
    out.copy_(torch.tensor(found))


def sum_one_by_one(values: Tensor, starts: Sequence[int], out: Tensor) -> None:
    """Sum values [Q, n] over each piece into `out` [Q, m], in its dtype, by one call a piece."""
    stops = (*starts[1:], values.shape[1])
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        out[:, number] = values[:, start:stop].sum(1, dtype=out.dtype)
