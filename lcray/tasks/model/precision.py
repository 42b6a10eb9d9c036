"""Exact float32: no TF32 or bfloat16 inside of products, on GPUs and on CPUs.

torch may be allowed to round the factors of a float32 matrix product or convolution to 10 (TF32) or
7 (bfloat16) bits of mantissa, which is too few for a difference of losses. The switches that allow
it are global to the process, and a task's module may turn them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lcray.errors import TaskError

_BACKENDS = (
    "",
    "cuda.matmul",
    "cudnn",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)
_LAST = 2.0**-12  # TF32 and bfloat16 round 1 + this to 1
_SIZE = 128  # large enough for the kernels that models use


def exact_float32() -> None:
    """Make this process compute float32 products in float32, whatever was allowed before."""
    # The older switches first: torch refuses to read them if they disagree with the newer ones.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for backend in _backends():
        backend.fp32_precision = "ieee"


@contextmanager
def precision_kept() -> Iterator[None]:
    """A context, or decorator, after which products are as exact as they were before."""
    matmul, cuda, cudnn = map(_older, ("", "cuda.matmul", "cudnn"))
    newer = [backend.fp32_precision for backend in _backends()]
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cuda is not None:
            torch.backends.cuda.matmul.allow_tf32 = cuda
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for backend, value in zip(_backends(), newer, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = value


def _older(name: str) -> Any:
    """The value of an older switch; None if torch refuses, since the newer ones disagree."""
    try:
        return _backend(name).allow_tf32 if name else torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _backends() -> list[Any]:
    """The backends with the newer switch; none before torch 2.9."""
    found = map(_backend, _BACKENDS)
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def _backend(name: str) -> Any:
    backend: Any = torch.backends
    for part in filter(None, name.split(".")):
        backend = getattr(backend, part, None)
    return backend


def check_float32(device: torch.device) -> None:
    """Check that products of float32 keep all bits of float32.

    Args:
        device: where to compute.

    Raises:
        TaskError: if a matrix product or a convolution keeps fewer bits.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    factor, unit = torch.full((_SIZE, _SIZE), 1 + _LAST, **options), torch.eye(_SIZE, **options)
    with torch.no_grad():
        products = {
            "matrix product": factor @ unit,
            "convolution": torch.conv2d(factor.view(1, _SIZE, 16, -1), unit.view(_SIZE, -1, 1, 1)),
        }
    for what, product in products.items():
        if float((product.double() - (1 + _LAST)).abs().max()) > _LAST / 2:
            raise TaskError(
                f"device {device}: a {what} of float32 is rounded to fewer bits; switch off what "
                "makes it so (autocast, TF32, bfloat16 arithmetic) in the task's module"
            )
