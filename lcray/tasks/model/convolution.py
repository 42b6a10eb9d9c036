"""Faster convolutions on the CPU: padding channels in the backward pass.

Legend: N images, C channels in, O channels out, H and W height and width, kernels h by w.

oneDNN's kernels process channels in steps of 16. In ``channels_last``, the gradient of an input
with 20 channels takes 1.5 times as long as with 32, since the remainder is slow. So it is computed
with weights of 0 for the missing channels, and the gradients of these channels are dropped. The
remaining numbers are sums of the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcray.tasks.model.replacements import Replacements

_STEP = 16  # channels
_WORTH = 1.7  # times the channels: more padding than this costs more than it saves

Pair = Sequence[int]
Geometry = tuple[list[int], list[int], list[int]]


class PaddedConvolutions(Replacements):
    """While active, `torch.nn.functional.conv2d` pads its input's gradient if that is faster.

    Attributes:
        used: whether it has padded; if it never does, the mode may be left out.
    """

    def __init__(self) -> None:
        super().__init__({F.conv2d: self._conv2d})
        self.used = False

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
    ) -> Tensor:
        if groups != 1 or isinstance(padding, str) or not _pays(input, weight):
            plain: Any = F.conv2d  # each overload takes a padding or a word, none takes both
            output: Tensor = plain(input, weight, bias, stride, padding, dilation, groups)
            return output
        self.used = True
        geometry = _pair(stride), _pair(padding), _pair(dilation)
        apply: Callable[..., Tensor] = _Padded.apply
        return apply(input, weight, bias, geometry)


def _pays(input: Tensor, weight: Tensor) -> bool:
    channels = weight.shape[1]
    padded = -(-channels // _STEP) * _STEP
    return (
        input.requires_grad
        and input.dim() == 4
        and input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and _STEP < channels < padded <= _WORTH * channels
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def _pair(value: int | Pair) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.has_bias = geometry, bias is not None
        return F.conv2d(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry

        def passed(over: Tensor, by: Tensor, biases: list[int] | None, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                gradient, over, by, biases, stride, padding, dilation, False, [0, 0], 1, mask
            )

        wanted = ctx.needs_input_grad
        found = None
        if wanted[0]:
            n, channels, *size = input.shape
            more = -channels % _STEP
            padded = F.pad(weight, (0, 0, 0, 0, 0, more))
            padded = padded.contiguous(memory_format=torch.channels_last)
            # The input's gradient depends only on the input's shape.
            sizes = (n, channels + more, *size)
            shape = torch.empty(sizes, dtype=input.dtype, memory_format=torch.channels_last)
            found = passed(shape, padded, None, [True, False, False])[0][:, :channels]
        biases = [weight.shape[0]] if ctx.has_bias else None
        mask = [False, wanted[1], ctx.has_bias and wanted[2]]
        _, by_weight, by_bias = passed(input, weight, biases, mask)
        return found, by_weight, by_bias, None
