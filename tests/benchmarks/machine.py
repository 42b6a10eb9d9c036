"""The best rates of the machine, and what a network's gradient takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lcray.tasks.task import Task, split_data

from .adapter import tune, worker_environment
from .player import Player, ask_all
from .suite import Bench, Row

Work = tuple[float, Callable[[], Tensor]]  # FLOPs of a call, and the call


def _sgemm() -> Iterator[Work]:
    for n in (512, 1024, 1536):
        a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
        yield 2.0 * n**3, lambda a=a, b=b, out=out: torch.mm(a, b, out=out)


def _conv() -> Iterator[Work]:
    """Convolutions 3x3 of n images of size h, from c channels to as many."""
    for n, c, h in ((16, 32, 32), (16, 64, 32), (16, 128, 16), (16, 256, 14)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, c, h, h).contiguous(memory_format=layout)
            w = torch.randn(c, c, 3, 3).contiguous(memory_format=layout)
            yield 18.0 * n * c * c * h * h, lambda x=x, w=w: F.conv2d(x, w, padding=1)


def best_rate(kind: str, repeats: int = 4) -> float:
    """The best FLOP/s over sizes of ``sgemm`` or ``conv``, in float32 and without gradients."""
    works: Iterable[Work] = {"sgemm": _sgemm, "conv": _conv}[kind]()
    best = 0.0
    with torch.no_grad():
        for flops, work in works:
            work()
            for _ in range(repeats):
                begin = time.perf_counter()
                work()
                best = max(best, flops / (time.perf_counter() - begin))
    return best


def count_flops(task: Task, split: str = "train", samples: int = 16) -> float:
    """FLOPs of a sample in one forward and backward pass; a multiplication and addition are two."""
    data = split_data(task, [split])[split]
    assert isinstance(data, tuple)
    model = task.model().eval()
    # The fused attention of the CPU is not counted; the plain one is, and takes as many.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = task.loss(model, tuple(tensor[:samples] for tensor in data))
        assert isinstance(losses, Tensor)
        losses.sum().backward()
    return counter.get_total_flops() / samples


class Machine:
    """A player that is nothing but fast."""

    def __init__(self) -> None:
        tune()
        torch.set_num_threads(1)

    def peak(self, kind: str) -> float:
        return best_rate(kind)


def measure(bench: Bench) -> Iterator[Row]:
    """The best rates of one process and of two at once, one thread each."""
    environment = worker_environment()
    with (
        Player("tests.benchmarks.machine:Machine", environment) as one,
        Player("tests.benchmarks.machine:Machine", environment) as two,
    ):
        for kind in ("sgemm", "conv"):
            alone = max(one.ask("peak", kind=kind) for _ in range(3))
            both = max(sum(ask_all((one, two), "peak", kind=kind)) for _ in range(3))
            yield Row("machine", f"{kind}_one_process", alone / 1e9, "GFLOP/s")
            yield Row("machine", f"{kind}_two_processes", both / 1e9, "GFLOP/s")


CASES = {"machine": measure}
