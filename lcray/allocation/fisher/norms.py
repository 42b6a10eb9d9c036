"""Squared norms of per-sample gradients from a layer's inputs and outputs, without the gradients.

Legend: B samples, G groups of channels, K positions (tokens, pixels), O outputs, I inputs.

The gradient of one sample for a weight is a sum of outer products over the positions at which the
weight was used: l_k is the gradient of the output there, r_k the input. Its squared norm is

    |Σ_k l_k r_kᵀ|² = Σ_{k,k'} (l_k · l_k') (r_k · r_k')

(Goodfellow 2015, arXiv 1510.01799, for K = 1; Li et al. 2021, arXiv 2110.05679, for sequences).
If many positions share a small weight, computing the sum itself is cheaper: it is then computed for
a few samples at a time (the choice of Bu et al. 2022, arXiv 2205.10683).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """A gradient as outer products, Σ_k left_k right_kᵀ, for each sample and group.

    Attributes:
        left: [B, G, K, O]; or [B, G, K] int64, the index of the one row that is 1, all others 0.
        right: [B, G, K, I].
        shape: (G, O, I), the shape of a sample's gradient.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Whole:
    """A small gradient, stored whole, [B, n]: of a bias, or of the scale of a norm layer."""

    gradient: Tensor


def square(parts: Sequence[Outer | Whole]) -> Tensor | None:
    """|Σ parts|² of each sample, [B] float64; None if the parts cannot be combined.

    Args:
        parts: of one layer, at least one.
    """
    wholes = [part.gradient for part in parts if isinstance(part, Whole)]
    outers = [part for part in parts if isinstance(part, Outer)]
    if wholes and outers:
        return None
    if wholes:
        total = wholes[0].double()
        for gradient in wholes[1:]:
            total = total + gradient
        return total.square().sum(1)
    if len({part.shape for part in outers}) > 1:
        return None
    _, rows, columns = outers[0].shape
    positions = sum(part.right.shape[2] for part in outers)
    if positions * (rows + columns) <= rows * columns:
        return _gram(outers)
    total = _summed(outers[0])
    for part in outers[1:]:
        total = total + _summed(part)
    return total.double().square().sum((1, 2, 3))


def _summed(part: Outer) -> Tensor:
    """The summed outer products, [B, G, O, I]."""
    left = part.left
    if not left.is_floating_point():
        left = F.one_hot(left, part.shape[1]).to(part.right.dtype)
    return left.transpose(-1, -2) @ part.right


def _gram(parts: Sequence[Outer]) -> Tensor:
    """The squared norm from Gram matrices, in float64, since its terms may cancel."""
    total: Tensor | None = None
    for i, one in enumerate(parts):
        for j, other in enumerate(parts[: i + 1]):
            right = one.right.double() @ other.right.double().transpose(-1, -2)
            terms = (_products(one, other) * right).sum((1, 2, 3)) * (1 if i == j else 2)
            total = terms if total is None else total + terms
    assert total is not None
    return total


def _products(one: Outer, other: Outer) -> Tensor:
    """l_k · l_k' for all positions k of one part and k' of the other, [B, G, K, K']."""
    a, b = one.left, other.left
    if a.is_floating_point() and b.is_floating_point():
        return a.double() @ b.double().transpose(-1, -2)
    if a.is_floating_point():  # a[k, id of k']
        ids = b[:, :, None, :].expand(*a.shape[:3], b.shape[-1])
        return a.gather(3, ids).double()
    if b.is_floating_point():
        return _products(other, one).transpose(-1, -2)
    return (a[..., :, None] == b[..., None, :]).double()
