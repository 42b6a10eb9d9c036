"""How many samples per batch, and which memory format: a short probe of a worker's own rate.

A batch must be large enough to keep the arithmetic units busy, and small enough for its
activations to fit into the caches and the free memory. The best size depends on model and machine,
so it is measured. The plan keeps the choice, and every worker follows the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lcray.errors import TaskError
from lcray.execution.worker.workbench import LARGEST_BATCH, Workbench
from lcray.planning.plan import DEFAULT_BATCH_SIZE, DEFAULT_MEMORY_FORMAT, MEMORY_FORMATS
from lcray.tasks.data.pytree import map_tensors
from lcray.tasks.data.split import SplitData

_SMALLEST = 16  # samples per batch
_FEW = 64  # samples to measure a rate over, at least
_PAIR = 2  # samples that show the memory per sample, and whether a format works at all
_STEADY_SECONDS = 0.15  # to measure one rate
_PASS_SECONDS = 0.05  # a pass takes enough batches for this time
_NEAR, _FALLING = 0.97, 0.9  # relative to the best rate: as good; not worth continuing
_MARGIN = 2.0  # memory that a pass needs, relative to the memory it saves for backward
_SHARE, _MOST_SECONDS = 0.1, 30.0  # of a long gradient's time: limit for probing; and in seconds
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Tuning:
    """The choices of a probe.

    Attributes:
        batch_size: samples per batch.
        memory_format: ``contiguous`` or ``channels_last``.
        rates: measurements: batch size, memory format, and samples per second of forward and
            backward pass.
        sample_bytes: memory for the activations of one sample, in bytes; 0 if unknown.
    """

    batch_size: int
    memory_format: str
    rates: tuple[tuple[int, str, float], ...] = ()
    sample_bytes: float = 0.0


def tune(bench: Workbench, *, seconds: float = 2.0) -> Tuning:
    """Choose what the settings leave open; the model must be at a point of the run.

    If batches are part of the loss, their size stays unchanged. For splits of up to 256 samples
    nothing is measured, so that small analyses do not depend on the time that passes take. If the
    loss fails, this function ignores it: evaluating the splits will report the error.

    Args:
        bench: the task; the caller then adopts its batches and memory format.
        seconds: time it may take; more if a single gradient takes long.
    """
    before = bench.memory_format
    try:
        return _Probe(bench, seconds).choose()
    except TaskError:
        return Tuning(bench.batch_size, before)
    finally:
        bench.set_memory_format(before)


def activation_bytes(bench: Workbench, excerpt: SplitData) -> float:
    """Memory that forward and backward pass need for a sample of `excerpt`, beside the data.

    Raises:
        TaskError: if the task's loss fails.
    """
    out, device = bench.engine.new_vector(), bench.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        taken = -torch.cuda.memory_allocated(device)
        bench.engine.evaluate(excerpt, out)
        taken += torch.cuda.max_memory_allocated(device)
        return taken / max(excerpt.batch_sizes)
    storages = {bench.flat.theta.untyped_storage().data_ptr(): 0}

    def leave_out(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = 0
        return tensor

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    for batch in excerpt.batches:
        map_tensors(leave_out, batch)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        bench.engine.evaluate(excerpt, out)
    return _MARGIN * sum(storages.values()) / excerpt.n_samples


def rough_seconds(bench: Workbench, enough: float) -> float:
    """Roughly the seconds of one gradient of every split, from as few samples as possible.

    Small batches are slow, so a measurement is too long rather than too short. It is taken anew on
    more samples until it is at most `enough`, or has become exact.

    Args:
        bench: the task; its model must be at a point of the run.
        enough: seconds; less need not be known more exactly.

    Returns:
        The seconds; 0 if the loss fails, which evaluating the splits will report.
    """
    out, samples = bench.engine.new_vector(), _SMALLEST
    most = max(source.n_samples for source in bench.sources)
    while True:
        found = spent = 0.0
        for number, source in enumerate(bench.sources):
            passes = 1 if source.sorted_by_group else max(1, len(source.groups))
            size = bench.batch_size if bench.fixed_batches else min(samples, bench.batch_size)
            try:
                excerpt = bench.excerpt(number, size, -(-samples // size))
                seconds = min(_seconds(bench, excerpt, out) for _ in range(2))
            except TaskError:
                return 0.0
            found += passes * seconds * source.n_samples / excerpt.n_samples
            spent = max(spent, seconds)
        if found <= enough or spent > _STEADY_SECONDS or samples >= most:
            return found
        samples *= 8


def _seconds(bench: Workbench, excerpt: SplitData, out: Tensor) -> float:
    """The time of one forward and backward pass: processor time, or wall time on a GPU."""
    on_gpu = bench.device.type == "cuda"
    begin, watch = time.perf_counter(), processor_seconds(torch.get_num_threads())
    bench.engine.evaluate(excerpt, out)
    if on_gpu:
        torch.cuda.synchronize(bench.device)
    wall = time.perf_counter() - begin
    return wall if on_gpu else watch() or wall  # 0 where clocks are coarse


def processor_seconds(threads: int) -> Callable[[], float]:
    """A stopwatch: calling it gives the seconds since then, as if the processors were free.

    On a busy machine, wall time mostly measures other processes. This is the processor time of the
    calling thread, or the processor time of all threads of this process divided by `threads`,
    whichever is longer: work of a single thread counts in full, and common work counts once.
    """
    own, every = time.thread_time(), time.process_time()
    return lambda: max(time.thread_time() - own, (time.process_time() - every) / threads)


class _Probe:
    """Measures on the largest split."""

    def __init__(self, bench: Workbench, seconds: float) -> None:
        self._bench, self._seconds = bench, seconds
        self._begin = time.perf_counter()
        sizes = [source.n_samples for source in bench.sources]
        self._n_samples = max(sizes)
        self._number = sizes.index(self._n_samples)
        self._out = bench.engine.new_vector()
        self._rates: dict[tuple[int, str], float] = {}

    def choose(self) -> Tuning:
        """The result of `tune`."""
        bench, size = self._bench, self._bench.batch_size
        sample = activation_bytes(bench, bench.excerpt(self._number, self._trial(_PAIR)))
        free = bench.settings.batch_size is None and not bench.fixed_batches
        if free:
            most = _fitting(bench.room // 2, sample, bench.largest_batch)
            size = min(size, most)
        if self._n_samples > DEFAULT_BATCH_SIZE:
            both = self._may_change_format()
            if both:
                self._keep_faster(self._trial(min(size, _FEW)))
            if free:
                size = self._climb(most)
            if both:
                self._keep_faster(size)
        rates = tuple((*key, rate) for key, rate in self._rates.items())
        return Tuning(size, bench.memory_format, rates, sample)

    def _trial(self, samples: int) -> int:
        """`samples`, or the batch size if batches are part of the loss: it may need whole ones."""
        return self._bench.batch_size if self._bench.fixed_batches else samples

    def _may_change_format(self) -> bool:
        """Whether the model has images to convolve, and computes the same in both formats."""
        bench = self._bench
        found = any(isinstance(module, _CONVOLUTIONS) for module in bench.flat.model.modules())
        if bench.settings.memory_format != "auto" or not found:
            return False
        there = self._losses(DEFAULT_MEMORY_FORMAT)
        try:
            here = self._losses("channels_last")
        except TaskError:  # a view of contiguous memory, say
            return False
        finally:
            bench.set_memory_format(DEFAULT_MEMORY_FORMAT)
        # Not so where the model depends on strides.
        return all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(there, here, strict=True))

    def _losses(self, memory_format: str) -> list[float]:
        """Of two samples or a whole batch of every split, passed forward and backward."""
        bench = self._bench
        bench.set_memory_format(memory_format)
        size, numbers = self._trial(_PAIR), range(len(bench.sources))
        excerpts = [bench.excerpt(number, size) for number in numbers]
        return [bench.engine.evaluate(excerpt, self._out).loss for excerpt in excerpts]

    def _keep_faster(self, batch_size: int) -> None:
        """Set the memory format that is faster at this batch size."""
        rates = {}
        for memory_format in MEMORY_FORMATS:
            self._bench.set_memory_format(memory_format)
            rates[memory_format] = self._rate(batch_size, self._excerpt(batch_size))
        self._bench.set_memory_format(max(rates, key=lambda name: rates[name]))

    def _climb(self, most: int) -> int:
        """The smallest size whose rate comes near the best; larger ones are tried first."""
        first = min(_FEW, most)
        found = self._rates_from(first, most)
        size, best = first // 2, max(found.values())
        while size >= _SMALLEST and found[2 * size] >= _NEAR * best and self._has_time(0.0):
            found[size] = self._rate(size, self._excerpt(size))
            best, size = max(best, found[size]), size // 2
        return min(size for size, rate in found.items() if rate >= _NEAR * best)

    def _rates_from(self, first: int, most: int) -> dict[int, float]:
        """The rates of ever larger batches, while rates improve and time is left."""
        found: dict[int, float] = {}
        size, slower, widest = first, 0, 0
        while size <= most:
            begin = time.perf_counter()
            try:
                excerpt = self._excerpt(size)
                fetching = time.perf_counter() - begin
                width = max(excerpt.batch_sizes)
                if width == widest:  # the split, or its largest group, has no more samples
                    break
                found[size] = self._rate(size, excerpt)
            except TaskError:  # out of memory, say
                if not found:
                    raise
                break
            slower += found[size] < _FALLING * max(found.values())
            # The next takes twice as long, and is timed twice.
            if slower == 2 or not self._has_time(2 * fetching + 4 * width / found[size]):
                break
            size, widest = 2 * size, width
        return found

    def _has_time(self, seconds: float) -> bool:
        """Whether so many more seconds stay within the limit for probing."""
        rate = max(self._rates.values())
        limit = max(self._seconds, min(_MOST_SECONDS, _SHARE * self._n_samples / rate))
        return time.perf_counter() - self._begin + seconds <= limit

    def _excerpt(self, batch_size: int) -> SplitData:
        return self._bench.excerpt(self._number, batch_size, -(-_FEW // batch_size))

    def _rate(self, batch_size: int, excerpt: SplitData) -> float:
        """Samples per second, forward and backward, in batches of this size."""
        key = batch_size, self._bench.memory_format
        if key not in self._rates:
            seconds, held = self._pass_seconds(excerpt), len(excerpt.batch_sizes)
            count = math.ceil(_PASS_SECONDS / max(seconds, 1e-6) * held)
            if count > held:
                # Repeating the same few samples would read them from the cache; a split does not.
                excerpt = self._bench.excerpt(self._number, batch_size, count)
                seconds = self._pass_seconds(excerpt)
            self._rates[key] = excerpt.n_samples / seconds
        return self._rates[key]

    def _pass_seconds(self, excerpt: SplitData) -> float:
        """The shortest time of a few passes."""
        times: list[float] = []
        while len(times) < 2 or (len(times) < 6 and sum(times) < _STEADY_SECONDS):
            times.append(_seconds(self._bench, excerpt, self._out))
        return min(times)


def _fitting(room: int, sample_bytes: float, most: int = LARGEST_BATCH) -> int:
    """The largest power of two of samples that fit into `room` bytes, from 1 to `most`."""
    count = int(min(most, room / sample_bytes)) if sample_bytes else most
    return 1 << max(0, count.bit_length() - 1)
