from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lcray.errors import TaskError
from lcray.tasks.data.batches import THREAD, Batches

CPU = torch.device("cpu")


def stream(
    n: int,
    read: Callable[[int], Any] = lambda number: {"x": torch.full((2,), number)},
    place: Callable[[Tensor], Tensor] = lambda t: t.double(),
    device: torch.device = CPU,
) -> Batches:
    return Batches(n, read, place, device, placed=None, nbytes=0)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


class TestStream:
    @pytest.mark.parametrize("n", [1, 2, 3, 10])
    def test_every_batch_in_order_every_time(self, n: int) -> None:
        found = stream(n)
        for _ in range(2):
            values = [batch["x"].tolist() for batch in found]
            assert values == [[float(i)] * 2 for i in range(n)]
        assert len(found) == n and not found.resident

    def test_two_passes_at_a_time(self) -> None:
        found = stream(5)
        pairs = [(int(a["x"][0]), int(b["x"][0])) for a, b in zip(found, found, strict=True)]
        assert pairs == [(i, i) for i in range(5)]
        assert readers() == []

    def test_batches_are_read_in_a_thread_and_placed_by_the_reader_of_the_loop(self) -> None:
        where: dict[str, set[str]] = {"read": set(), "place": set()}

        def read(number: int) -> Tensor:
            where["read"].add(threading.current_thread().name)
            return torch.tensor(number)

        def place(tensor: Tensor) -> Tensor:
            where["place"].add(threading.current_thread().name)
            return tensor

        list(stream(4, read, place))
        assert where["place"] == {threading.current_thread().name}
        assert len(where["read"]) == 1 and next(iter(where["read"])).startswith(THREAD)

    def test_two_batches_are_read_ahead_and_no_more(self) -> None:
        read: list[int] = []

        def note(number: int) -> Tensor:
            read.append(number)
            return torch.tensor(number)

        for number, _ in enumerate(stream(8, note)):
            expected = min(8, number + 3)
            wait_for(lambda expected=expected: len(read) == expected)
            time.sleep(0.01)
            assert read == list(range(expected))

    def test_a_single_batch(self) -> None:
        found = stream(3)
        assert found[1]["x"].tolist() == [1.0, 1.0]
        assert found[-1]["x"].tolist() == [2.0, 2.0]
        with pytest.raises(IndexError):
            found[3]


class TestLeaving:
    """No thread outlives the loop."""

    def test_at_the_end(self) -> None:
        list(stream(5))
        assert readers() == []

    def test_early(self) -> None:
        for batch in stream(100):
            assert len(readers()) == 1
            if batch["x"][0] == 3:
                break
        assert readers() == []

    def test_early_while_a_batch_is_being_read(self) -> None:
        started, go_on, read = threading.Event(), threading.Event(), []

        def slow(number: int) -> Tensor:
            read.append(number)
            if number == 1:
                started.set()
                go_on.wait(60)
            return torch.tensor(number)

        found = iter(stream(100, slow))
        next(found)
        started.wait(60)
        threading.Timer(0.05, go_on.set).start()
        del found
        assert readers() == [] and read == [0, 1]

    def test_by_an_error_in_the_loop(self) -> None:
        with pytest.raises(ZeroDivisionError) as caught:
            for _ in stream(100):
                _ = 1 / 0
        assert readers() == [] and caught.traceback, "while the error is still held"

    def test_by_an_error_of_the_thread(self) -> None:
        def read(number: int) -> Tensor:
            if number == 2:
                raise TaskError("batch 2: gone")
            return torch.tensor(number)

        seen = []
        with pytest.raises(TaskError, match="batch 2: gone"):
            for batch in stream(9, read):
                seen.append(int(batch))
        assert seen == [0, 1]
        assert readers() == []

    def test_by_an_error_of_placing(self) -> None:
        def place(tensor: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream(9, place=place))
        assert readers() == []


class TestResident:
    def test_the_batches_themselves(self) -> None:
        placed = [torch.ones(1), torch.zeros(1)]
        found = Batches(2, lambda i: None, lambda t: t, CPU, placed=placed, nbytes=8)
        assert found.resident and len(found) == 2 and found.nbytes == 8
        for _ in range(2):
            assert all(a is b for a, b in zip(found, placed, strict=True))
        assert found[1] is placed[1]
        assert readers() == []

    def test_what_reads_the_data_is_let_go(self) -> None:
        class Owner:
            def read(self, number: int) -> Any: ...

        owner = Owner()
        gone = weakref.ref(owner)
        found = Batches(1, owner.read, lambda t: t, CPU, placed=[torch.ones(1)], nbytes=4)
        del owner
        assert gone() is None and len(found) == 1


class TestCuda:
    """What a stream asks of a GPU, seen without one."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []

        def pin(tensor: Tensor) -> Tensor:
            calls.append(("pin", threading.current_thread().name.startswith(THREAD)))
            return tensor

        def to(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
            calls.append(("to", str(device), non_blocking))
            return tensor

        monkeypatch.setattr(Tensor, "pin_memory", pin)
        monkeypatch.setattr(Tensor, "to", to)
        monkeypatch.setattr(
            torch.cuda, "set_device", lambda device: calls.append(("device", str(device)))
        )
        return calls

    def test_batches_are_pinned_in_the_thread_and_moved_without_waiting(
        self, calls: list[Any]
    ) -> None:
        placed = []

        def place(tensor: Tensor) -> Tensor:
            placed.append(tensor)
            return tensor

        values = [int(b["x"][0]) for b in stream(3, place=place, device=torch.device("cuda", 1))]
        assert values == [0, 1, 2] and len(placed) == 3
        assert calls.count(("device", "cuda:1")) == 1
        assert calls.count(("pin", True)) == 3
        assert calls.count(("to", "cuda:1", True)) == 3

    def test_nothing_of_it_on_the_cpu(self, calls: list[Any]) -> None:
        assert [int(b["x"][0]) for b in stream(3, place=lambda t: t)] == [0, 1, 2]
        assert calls == []
