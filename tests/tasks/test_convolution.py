"""The padded backward pass of convolutions gives the gradients of torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray.tasks.model.convolution import PaddedConvolutions


def inputs(channels: int, out: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(channels)
    x = torch.randn(3, channels, 8, 7, generator=random, dtype=dtype)
    w = torch.randn(out, channels, 3, 2, generator=random, dtype=dtype)
    b = torch.randn(out, generator=random, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    return x, w.requires_grad_(), b.requires_grad_()


def gradients(tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, list[Tensor]]:
    x, w, b = tensors
    y = F.conv2d(torch.tanh(x), w, b, **options)
    return y, list(torch.autograd.grad((y**3).sum(), tensors))


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"padding": (1, 2)}, {"dilation": 2, "padding": 1}, {"stride": (1, 2)}],
)
@pytest.mark.parametrize("channels", [20, 24, 31, 40])
def test_gradients_are_those_of_torch(channels: int, options: dict[str, Any]) -> None:
    y, expected = gradients(
        tuple(t.detach().double().requires_grad_() for t in inputs(channels)), **options
    )
    mode = PaddedConvolutions()
    with mode:
        found_y, found = gradients(inputs(channels), **options)
    assert mode.used
    assert torch.allclose(found_y.double(), y, rtol=1e-4, atol=1e-4)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("channels", [3, 10, 16, 17, 32, 33])
def test_it_keeps_out_where_it_would_not_pay(channels: int) -> None:
    mode = PaddedConvolutions()
    with mode:
        gradients(inputs(channels))
    assert mode.used == (channels == 33)  # 48 is below 1.7 times 33, 32 not 1.7 times 17


def test_it_keeps_out_of_what_it_does_not_know() -> None:
    mode = PaddedConvolutions()
    x, w, b = inputs(20)
    with mode:
        F.conv2d(x.detach(), w, b)  # the first layer: no gradient for images
        F.conv2d(x.contiguous(), w, b)
        F.conv2d(x, w, b, padding="valid")
        F.conv2d(torch.cat([x] * 3, 1), w, b, groups=3)
        F.conv2d(*inputs(20, dtype=torch.float64))
    assert not mode.used


def test_frozen_weights_and_missing_biases() -> None:
    x, w, _ = inputs(20)
    w = w.detach()
    (expected,) = torch.autograd.grad((F.conv2d(x, w) ** 2).sum(), [x])
    with PaddedConvolutions() as mode:
        layer = nn.Conv2d(20, 9, (3, 2), bias=False)
        layer.weight = nn.Parameter(w, requires_grad=False)
        (found,) = torch.autograd.grad((layer(x) ** 2).sum(), [x])
    assert mode.used
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_a_gradient() -> None:
    def penalty() -> Tensor:
        x, w, b = inputs(20)
        (slope,) = torch.autograd.grad((F.conv2d(x, w, b) ** 3).sum(), [x], create_graph=True)
        return torch.autograd.grad((slope**2).sum(), [w])[0]

    expected = penalty()
    with PaddedConvolutions() as mode:
        found = penalty()
    assert mode.used
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
