"""The probe: what it measures, and what it chooses by rates that the tests make up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcray.execution.worker import tuning
from lcray.execution.worker.tuning import activation_bytes, tune
from lcray.execution.worker.workbench import Share, Workbench
from lcray.planning.make import make_settings
from lcray.tasks.task import Task

N = 5000


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a


class Net(nn.Module):
    """Convolves images [n, 2, 4, 4]; `flatten` makes features [n, 27] of its maps [n, 3, 3, 3]."""

    def __init__(self, flatten: Callable[[Tensor], Tensor] = lambda maps: maps.flatten(1)) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(2, 3, 2)
        self._flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        return self._flatten(self.conv(x)).cumsum(1).sin().mean(1)


def loss(net: nn.Module, batch: Any) -> Tensor:
    return net(batch[0]).tanh()


def points(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 2 * n).reshape(n, 2), torch.arange(n) % 3


def images(n: int = 300) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return pixels, torch.arange(n) % 3


def bench(
    model: Callable[[], nn.Module] = Line, data: Any = None, task: Any = None, **options: Any
) -> Workbench:
    known = {"splits": {"val": points(4), "train": points()}, "loss": loss}
    if data is not None:
        known["splits"] = {"train": data}
    known |= task or {}
    whole = Task(model=model, **known)  # type: ignore[arg-type]
    return Workbench(whole, make_settings(options), share=Share(memory=2**40))


Rates = Callable[[int, str], float]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rates], list[tuple[int, str]]]:
    """Sets the rates by size and format; gives what is asked for, in order."""

    def use(rates: Rates) -> list[tuple[int, str]]:
        asked: list[tuple[int, str]] = []

        def rate(self: Any, batch_size: int, excerpt: Any) -> float:
            key = batch_size, self._bench.memory_format
            if key not in self._rates:
                asked.append(key)
                self._rates[key] = rates(*key)
            return self._rates[key]

        monkeypatch.setattr(tuning._Probe, "_rate", rate)
        monkeypatch.setattr(tuning._Probe, "_has_time", lambda self, seconds: True)
        return asked

    return use


class TestSize:
    def test_the_smallest_that_comes_near_the_best(self, measured: Any) -> None:
        rates = {64: 50, 128: 90, 256: 98, 512: 100, 1024: 99, 2048: 101, 4096: 99, 8192: 100}
        asked = measured(lambda size, form: rates[size])
        found = tune(bench())
        assert (found.batch_size, found.memory_format) == (256, "contiguous")  # 98 > 0.97 * 101
        assert [size for size, _ in asked] == list(rates)
        assert found.rates == tuple((size, "contiguous", rate) for size, rate in rates.items())

    def test_smaller_ones_are_tried_where_they_may_do(self, measured: Any) -> None:
        rates = {16: 98, 32: 99, 64: 100, 128: 80, 256: 70}
        asked = measured(lambda size, form: rates[size])
        assert tune(bench()).batch_size == 16
        assert [size for size, _ in asked] == [64, 128, 256, 32, 16]
        rates |= {32: 90}
        asked.clear()
        assert tune(bench()).batch_size == 64
        assert [size for size, _ in asked] == [64, 128, 256, 32]

    def test_one_slow_size_is_a_hiccup_two_are_the_end(self, measured: Any) -> None:
        rates = {64: 100, 128: 50, 256: 120, 512: 60, 32: 10}
        asked = measured(lambda size, form: rates[size])
        assert tune(bench()).batch_size == 256
        assert [size for size, _ in asked] == [64, 128, 256, 512]

    def test_time_ends_it(self, measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = measured(lambda size, form: size)
        monkeypatch.setattr(tuning._Probe, "_has_time", lambda self, seconds: len(asked) < 3)
        assert tune(bench()).batch_size == 256
        assert len(asked) == 3

    def test_none_above_what_the_split_holds(self, measured: Any) -> None:
        asked = measured(lambda size, form: size)
        assert tune(bench(data=points(700))).batch_size == 1024
        assert [size for size, _ in asked] == [64, 128, 256, 512, 1024]

    def test_none_above_the_largest_group(self, measured: Any) -> None:
        """Three groups of 200 samples: with up to 256 a batch they are whole already."""
        asked = measured(lambda size, form: size)
        grouped = bench(data=points(600), task={"groups": lambda batch: batch[1]})
        assert tune(grouped).batch_size == 256
        assert [size for size, _ in asked] == [64, 128, 256]

    def test_none_above_half_of_the_memory(self, measured: Any) -> None:
        """A sample needs 8 bytes, so 4,096 bytes of room hold 256 in their half."""
        asked = measured(lambda size, form: size)
        found = bench()
        found.room = 4096
        assert tune(found).batch_size == 256
        assert [size for size, _ in asked] == [64, 128, 256]
        found.room = 4095
        assert tune(found).batch_size == 128
        found.room = 400
        assert tune(found).batch_size == 16
        found.room = 0
        assert tune(found).batch_size == 1

    def test_memory_that_runs_out_ends_it(self, measured: Any) -> None:
        def rates(size: int, form: str) -> float:
            if size > 128:
                raise tuning.TaskError("out of memory")
            return size

        measured(rates)
        assert tune(bench()).batch_size == 128


class TestNothingToChoose:
    def test_sizes_that_were_asked_for(self, measured: Any) -> None:
        asked = measured(lambda size, form: size)
        assert tune(bench(batch_size=7)).batch_size == 7
        assert asked == []

    @pytest.mark.parametrize("n", [1, 5, 256])
    def test_few_samples_are_one_batch_and_nothing_is_timed(self, n: int, measured: Any) -> None:
        asked = measured(lambda size, form: size)
        found = tune(bench(Net, images(n)))
        assert (found.batch_size, found.memory_format, found.rates) == (256, "contiguous", ())
        assert asked == []

    def test_few_large_samples_must_still_fit(self) -> None:
        found = bench(data=points(200))
        found.room = 1000  # bytes; half of them for activations, 8 a sample
        assert tune(found).batch_size == 32

    def test_batches_that_are_part_of_the_loss(self, measured: Any) -> None:
        asked = measured(lambda size, form: size)
        assert tune(bench(batch_norm="batch")).batch_size == 256
        assert tune(bench(batch_norm="batch", batch_size=31)).batch_size == 31

        def by_batch() -> nn.Module:
            return nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), Line())

        found = bench(by_batch)
        found.room = 0
        assert tune(found).batch_size == 256, "not even for want of memory"
        assert asked == []

    @pytest.mark.parametrize(
        "failing", [lambda net, b: net(b[0]) / 0, lambda net, b: (net(b[0]), 0 * net(b[0]))]
    )
    def test_what_fails_is_left_to_the_evaluation(self, failing: Any, measured: Any) -> None:
        """Items without weight at the start of a split fail here alone."""
        measured(lambda size, form: size)

        def broken(net: nn.Module, batch: Any) -> Any:
            if len(batch[0]) == 2:
                return net(batch[0]).reshape(1, -1)
            return failing(net, batch)

        found = tune(bench(task={"loss": broken}))
        assert (found.batch_size, found.memory_format, found.rates) == (256, "contiguous", ())


class TestMemoryFormat:
    @staticmethod
    def channels_last_wins(size: int, form: str) -> float:
        return 2.0 * size if form == "channels_last" else size

    def test_the_faster_one(self, measured: Any) -> None:
        asked = measured(self.channels_last_wins)
        work = bench(Net, images())
        found = tune(work)
        assert (found.batch_size, found.memory_format) == (512, "channels_last")
        assert work.memory_format == "contiguous", "to adopt is the caller's"
        climbed = [(64, "channels_last"), *((s, "channels_last") for s in (128, 256, 512))]
        assert asked == [(64, "contiguous"), *climbed, (512, "contiguous")]
        measured(lambda size, form: size if form == "contiguous" else size / 2)
        assert tune(work).memory_format == "contiguous"

    def test_at_the_chosen_size(self, measured: Any) -> None:
        def rates(size: int, form: str) -> float:
            return size * (1.5 if (form == "channels_last") == (size > 64) else 1)

        measured(rates)
        assert tune(bench(Net, images())).memory_format == "channels_last"

    def test_at_the_size_that_was_asked_for(self, measured: Any) -> None:
        asked = measured(self.channels_last_wins)
        found = tune(bench(Net, images(), batch_size=20))
        assert (found.batch_size, found.memory_format) == (20, "channels_last")
        assert {size for size, _ in asked} == {20}

    def test_where_batches_are_part_of_the_loss_too(self, measured: Any) -> None:
        measured(self.channels_last_wins)
        found = tune(bench(Net, images(), batch_norm="batch"))
        assert (found.batch_size, found.memory_format) == (256, "channels_last")

    @pytest.mark.parametrize("asked", ["contiguous", "channels_last"])
    def test_not_where_one_was_asked_for(self, asked: str, measured: Any) -> None:
        forms = measured(lambda size, form: size)
        found = tune(bench(Net, images(), memory_format=asked))
        assert found.memory_format == asked
        assert {form for _, form in forms} == {asked}

    def test_only_where_there_are_convolutions_of_images(self, measured: Any) -> None:
        asked = measured(self.channels_last_wins)
        assert tune(bench()).memory_format == "contiguous"
        assert {form for _, form in asked} == {"contiguous"}

    @pytest.mark.parametrize(
        "flatten",
        [
            pytest.param(lambda maps: maps.view(len(maps), 27), id="a view that fails"),
            pytest.param(
                lambda maps: maps.as_strided((len(maps), 27), (27, 1)), id="values in memory order"
            ),
        ],
    )
    def test_not_where_the_model_depends_on_the_order_in_memory(
        self, flatten: Any, measured: Any
    ) -> None:
        asked = measured(self.channels_last_wins)
        found = tune(bench(lambda: Net(flatten), images()))
        assert found.memory_format == "contiguous"
        assert {form for _, form in asked} == {"contiguous"}

    def test_not_where_it_fails_on_another_split(self, measured: Any) -> None:
        def fails_on_small(net: nn.Module, batch: Any) -> Tensor:
            if batch[1][0] == 2:
                batch[0].view(-1)
            return loss(net, batch)

        measured(self.channels_last_wins)
        few, many = images(9), images()
        splits = {"train": many, "val": (few[0], few[1] * 0 + 2)}
        work = bench(Net, task={"splits": splits, "loss": fails_on_small})
        assert tune(work).memory_format == "contiguous"


class TestActivations:
    def test_what_a_pass_saves_twice(self) -> None:
        """The tanh saves its result, 4 bytes a sample; data and parameters do not count."""
        work = bench()
        for size in (2, 64):
            assert activation_bytes(work, work.excerpt(1, size)) == 8.0
        double = bench(dtype="float64")
        assert activation_bytes(double, double.excerpt(1, 2)) == 16.0

    def test_storages_count_once_and_whole(self) -> None:
        """Both products save y; half of what `wide` holds is saved, but all of it is kept."""

        def twice(net: nn.Module, batch: Any) -> Tensor:
            y = net(batch[0]).exp()  # saves y, 4 bytes
            wide = torch.stack((y, y), 1).exp()  # saves itself, 8 bytes
            return y * wide[:, 0]  # saves both again

        work = bench(task={"loss": twice})
        assert activation_bytes(work, work.excerpt(1, 8)) == 2.0 * 12


def set_clocks(monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float]) -> None:
    """That of the wall, of the thread and of the process alike: a machine with nothing else."""
    for name in ("perf_counter", "thread_time", "process_time"):
        monkeypatch.setattr(tuning.time, name, clock)


def test_rates_are_those_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a batch moves on by a second and a sample by a hundredth of one."""
    now = [0.0]
    set_clocks(monkeypatch, lambda: now[0])

    def slow(net: nn.Module, batch: Any) -> Tensor:
        now[0] += 1 + len(batch[0]) / 100
        return loss(net, batch)

    found = tune(bench(task={"loss": slow}), seconds=1e9)
    assert [size for size, _, _ in found.rates] == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    for size, _, rate in found.rates:
        width = -(-N // -(-N // size))  # batches differ by at most one sample
        assert rate == pytest.approx(width / (1 + width / 100), rel=1e-9)
    # 5,000 samples in one batch: 98.04 a second; 97 % of that, 95.1, takes more than 1,940.
    assert found.batch_size == 4096


def test_rates_are_those_of_data_that_do_not_stay_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock on which a sample takes 20 µs, and 10 µs in a batch that was the last one before."""
    now, last = [0.0], [0]
    set_clocks(monkeypatch, lambda: now[0])

    def cached(net: nn.Module, batch: Any) -> Tensor:
        now[0] += len(batch[0]) * (1e-5 if batch[0].data_ptr() == last[0] else 2e-5)
        last[0] = batch[0].data_ptr()
        return loss(net, batch)

    found = tune(bench(task={"loss": cached}), seconds=1e9)
    rates = {size: rate for size, _, rate in found.rates}
    assert [*rates] == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    for size in [*rates][:-1]:  # the last has all samples in one batch
        assert rates[size] == pytest.approx(50_000, rel=1e-9)


def test_a_long_gradient_may_be_probed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a hundred samples a second a gradient takes 50 s; a tenth of that goes beyond 2 s."""
    now = [0.0]
    set_clocks(monkeypatch, lambda: now[0])

    def slow(net: nn.Module, batch: Any) -> Tensor:
        now[0] += len(batch[0]) / 100
        return loss(net, batch)

    found = tune(bench(task={"loss": slow}), seconds=2.0)
    assert [size for size, _, _ in found.rates][:2] == [64, 128]
    assert 2.0 < now[0] < 6.0


def test_what_others_take_of_the_processor_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every batch of more than 64 waits for a second before it may go on."""
    wall, processor = [0.0], [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(tuning.time, "thread_time", lambda: processor[0])
    monkeypatch.setattr(tuning.time, "process_time", lambda: processor[0])

    def waits(net: nn.Module, batch: Any) -> Tensor:
        took = 1e-3 + len(batch[0]) / 1e6
        processor[0] += took
        wall[0] += took + (len(batch[0]) > 64)
        return loss(net, batch)

    found = tune(bench(task={"loss": waits}), seconds=1e9)
    for size, _, rate in found.rates:
        width = -(-N // -(-N // size))
        assert rate == pytest.approx(width / (1e-3 + width / 1e6), rel=0.02)  # ± a sample
    assert found.batch_size > 64


def test_a_pass_that_only_waits_takes_no_time_of_processors() -> None:
    """The clocks of this machine: half a second of sleep is none of work."""
    watch = tuning.processor_seconds(1)
    time.sleep(0.5)
    assert watch() < 0.25


@pytest.mark.parametrize(
    ("own", "every", "threads", "seconds"), [(2.0, 8.0, 4, 2.0), (1.0, 8.0, 4, 2.0), (5, 6, 4, 5)]
)
def test_threads_that_work_together_count_once(
    monkeypatch: pytest.MonkeyPatch, own: float, every: float, threads: int, seconds: float
) -> None:
    clocks = {"thread_time": 10.0, "process_time": 20.0}
    for name in clocks:
        monkeypatch.setattr(tuning.time, name, lambda name=name: clocks[name])
    watch = tuning.processor_seconds(threads)
    clocks["thread_time"] += own
    clocks["process_time"] += every
    assert watch() == seconds
