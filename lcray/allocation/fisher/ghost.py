"""Uses of a layer's tensors in a forward pass, and the gradient of each sample from them.

Legend: B samples, G groups of channels, K positions, O outputs, I inputs; see
    `lcray.allocation.fisher.norms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lcray.allocation.fisher.norms import Outer, Whole, square

ROOM = 1 << 26  # bytes for the samples in work, apart from inputs and gradients

#: Gives part of a layer's gradient, for some of the samples, from the gradient of the output.
Make = Callable[[Tensor, slice], Outer | Whole]


@dataclass(frozen=True)
class Use:
    """One place where a layer's tensor is used.

    Attributes:
        number: of the layer.
        edge: position in `Watch.edges` of the gradient that `make` takes.
        make: gives the gradient of each sample; None if there is no closed form.
        cost: bytes that it takes per sample.
        input: the input that `make` refers to; its version must not change.
        version: of the input when it was used.
    """

    number: int
    edge: int
    make: Make | None
    cost: int
    input: Tensor
    version: int


class Watch(TorchFunctionMode):
    """While active, records uses of layers' tensors by functions with a closed form.

    Uses that it does not see (e.g. a product by hand) make the result wrong: compare it with the
    gradient of a sample or two before you rely on it.

    Attributes:
        uses: by layer.
        edges: of the outputs; `torch.autograd.grad` takes them as inputs.

    Args:
        numbers: the number of each layer, by the id of its tensor.
        size: B; samples come along the first axis.
    """

    def __init__(self, numbers: Mapping[int, int], size: int) -> None:
        super().__init__()
        self._numbers, self._size = numbers, size
        self.uses: dict[int, list[Use]] = {}
        self.edges: list[GradientEdge] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, and record the tensors that it used."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reader = _READERS.get(func)
        if reader is not None and isinstance(out, Tensor) and out.requires_grad:
            # The edge of the node, not the tensor: later functions may write into the tensor.
            edge = get_gradient_edge(out)
            found = list(reader(self._size, *args, **kwargs))
            for tensor, make, cost in found:
                number = self._numbers.get(id(tensor))
                if number is not None:
                    given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
                    use = Use(number, len(self.edges), make, cost, given, given._version)
                    self.uses.setdefault(number, []).append(use)
            self.edges.append(edge)
        return out

    def squares(self, number: int, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """|G|² of each sample's gradient G of a layer, [B] float64; None without a closed form.

        Args:
            number: of the layer.
            gradients: the gradients at `edges`.
        """
        uses = self.uses.get(number, [])
        sound = all(use.make is not None and use.input._version == use.version for use in uses)
        if not uses or not sound:
            return None
        step = max(1, ROOM // max(1, sum(use.cost for use in uses)))
        found = []
        for start in range(0, self._size, step):
            made = list(_made(uses, gradients, slice(start, start + step)))
            known = square(made) if made else uses[0].input.new_zeros(1, dtype=torch.float64)
            if known is None:
                return None
            found.append(known.expand(min(step, self._size - start)))
        return torch.cat(found)


def _made(
    uses: Sequence[Use], gradients: Sequence[Tensor | None], part: slice
) -> Iterator[Outer | Whole]:
    for use in uses:
        gradient = gradients[use.edge]
        if gradient is not None and use.make is not None:  # else the loss does not depend on it
            yield use.make(gradient.detach(), part)


Found = Iterator[tuple[Tensor | None, Make | None, int]]
_BYTES = 8  # per number; Gram matrices are float64


def _linear(size: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    out, inner = weight.shape
    rows = input.numel() // max(1, inner)
    if rows % size or not rows:
        yield from ((weight, None, 0), (bias, None, 0))
        return
    k, seen = rows // size, input.detach().reshape(size, 1, rows // size, inner)

    def outer(gradient: Tensor, part: slice) -> Outer:
        return Outer(gradient.reshape(size, 1, k, out)[part], seen[part], (1, out, inner))

    def whole(gradient: Tensor, part: slice) -> Whole:
        return Whole(gradient.reshape(size, k, out)[part].sum(1))

    yield weight, outer, _cost(k, out, inner)
    yield bias, whole, _BYTES * out


def _cost(positions: int, rows: int, columns: int, groups: int = 1) -> int:
    """Bytes per sample: copies of both factors, and their products."""
    made = min(2 * positions * positions, rows * columns)
    return _BYTES * groups * (positions * (rows + columns) + made)


def _conv2d(
    size: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Found:
    if input.dim() != weight.dim() or len(input) != size:
        yield from ((weight, None, 0), (bias, None, 0))
        return
    out, inner = weight.shape[0] // groups, math.prod(weight.shape[1:])
    kernel, seen = tuple(weight.shape[2:]), input.detach()
    strides, dilations = _pair(stride, len(kernel)), _pair(dilation, len(kernel))
    pads = _pads(padding, kernel, dilations)
    if len(kernel) == 1:  # a sequence is an image of one row
        seen, kernel = seen.unsqueeze(2), (1, *kernel)
        strides, dilations = (1, *strides), (1, *dilations)

    def outer(gradient: Tensor, part: slice) -> Outer:
        left = gradient[part].flatten(2).unflatten(1, (groups, out)).transpose(-1, -2)
        columns = F.unfold(F.pad(seen[part], pads), kernel, dilations, 0, strides)
        right = columns.unflatten(1, (groups, inner)).transpose(-1, -2)
        return Outer(left, right, (groups, out, inner))

    def whole(gradient: Tensor, part: slice) -> Whole:
        return Whole(gradient[part].flatten(2).sum(2))

    positions = math.prod(s // t for s, t in zip(seen.shape[2:], strides, strict=True)) + 1
    yield weight, outer, _cost(positions, out, inner, groups)
    yield bias, whole, _BYTES * out * groups


def _pair(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Padding in the order of `torch.nn.functional.pad`: the last axis first."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        both = [(total // 2, total - total // 2) for total in totals]
    else:
        both = [(p, p) for p in _pair(0 if padding == "valid" else padding, len(kernel))]
    return [side for pair in reversed(both) for side in pair]


def _embedding(
    size: int,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found:
    rows = input.numel()
    if rows % size or not rows or max_norm is not None or scale_grad_by_freq:
        yield weight, None, 0
        return
    n, width = weight.shape
    ids = input.detach().reshape(size, 1, rows // size).long()
    left_out = None if padding_idx is None else padding_idx % n

    def outer(gradient: Tensor, part: slice) -> Outer:
        right = gradient.reshape(*ids.shape, width)[part]
        if left_out is not None:
            right = right.masked_fill((ids[part] == left_out)[..., None], 0)
        return Outer(ids[part], right, (1, n, width))

    yield weight, outer, _cost(rows // size, n, width)


def _layer_norm(
    size: int,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    shape = list(normalized_shape)
    n = math.prod(shape)
    if (input.numel() // max(1, n)) % size:
        yield from ((weight, None, 0), (bias, None, 0))
        return

    def by_sample(values: Tensor) -> Tensor:
        return values.reshape(size, -1, n)

    def scale(gradient: Tensor, part: slice) -> Whole:
        seen = by_sample(F.layer_norm(input.detach(), shape, eps=eps))[part]
        return Whole((by_sample(gradient)[part] * seen).sum(1))

    yield weight, scale, _BYTES * input.numel() // size
    yield bias, lambda gradient, part: Whole(by_sample(gradient)[part].sum(1)), _BYTES * n


def _batch_norm(
    size: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Found:
    if running_mean is None or running_var is None or training:
        yield from ((weight, None, 0), (bias, None, 0))
        return
    shape = [1, -1] + [1] * (input.dim() - 2)
    mean = running_mean.detach().view(shape)
    scale = torch.rsqrt(running_var.detach() + eps).view(shape)
    yield from _by_channel(size, input, weight, bias, lambda x: (x - mean) * scale)


def _group_norm(
    size: int,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    def normalized(seen: Tensor) -> Tensor:
        return F.group_norm(seen, num_groups, eps=eps)

    yield from _by_channel(size, input, weight, bias, normalized)


def _by_channel(
    size: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[Tensor], Tensor],
) -> Found:
    if input.dim() < 2 or len(input) != size:
        yield from ((weight, None, 0), (bias, None, 0))
        return

    def summed(values: Tensor) -> Whole:
        return Whole(values.reshape(*values.shape[:2], -1).sum(2))

    def scaled(gradient: Tensor, part: slice) -> Whole:
        return summed(gradient[part] * normalized(input.detach()[part]))

    yield weight, scaled, 2 * _BYTES * input.numel() // size
    yield bias, lambda gradient, part: summed(gradient[part]), _BYTES * input.shape[1]


_READERS: dict[Any, Callable[..., Found]] = {
    F.linear: _linear,
    F.conv1d: _conv2d,
    F.conv2d: _conv2d,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
}
