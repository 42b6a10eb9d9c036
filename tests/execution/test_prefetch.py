"""Walking along the checkpoints of a span: what is read, when, and what is refused."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcray.checkpoints import CheckpointSeries, State, open_series
from lcray.errors import CheckpointError
from lcray.execution.worker import prefetch
from lcray.execution.worker.prefetch import Walk
from lcray.planning.plan import Span
from lcray.tasks.model.flat import FlatModel

STEPS = (0, 1, 2, 3, 5, 8)


def states() -> dict[int, dict[str, Tensor]]:
    return {
        step: {"weight": torch.full((2, 3), float(step)), "bias": torch.tensor([step + 0.5] * 2)}
        for step in STEPS
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, tensors in states().items():
        save_file(tensors, tmp_path / f"step-{step}.safetensors")
    return tmp_path


class Reads:
    """A series that notes what was read, and by which thread."""

    def __init__(self, series: CheckpointSeries) -> None:
        self._series = series
        self.steps: list[int] = []
        self.threads: set[str] = set()

    def read(self, step: int, into: dict[str, Tensor] | None = None) -> State:
        self.steps.append(step)
        self.threads.add(threading.current_thread().name)
        return self._series.read(step, into=into)


def make(run: Path, hashes: dict[int, str] | None = None) -> tuple[Walk, Reads]:
    flat = FlatModel(nn.Linear(3, 2), torch.device("cpu"), torch.float32)
    reads = Reads(open_series(run))
    dtypes = {"weight": torch.float32, "bias": torch.float32}
    return Walk(reads, flat, dtypes, hashes), reads  # type: ignore[arg-type]


def expected(step: int) -> list[float]:
    return [float(step)] * 6 + [step + 0.5] * 2


def test_segments_follow_each_other_and_share_their_points(run: Path) -> None:
    walk, reads = make(run)
    found, last = [], None
    with walk:
        for segment, following in walk.segments(Span(STEPS)):
            assert last is None or segment.start is last.end
            assert segment.start.vector.tolist() == expected(segment.start.step)
            assert segment.end.vector.tolist() == expected(segment.end.step)
            after = following()
            assert after is following()  # however often it is asked
            assert after is None or after.start is segment.end
            found.append((segment.start.step, segment.end.step))
            last = segment
    assert tuple(found) == Span(STEPS).intervals and after is None
    assert reads.steps == list(STEPS)
    assert sorted(walk.hashes) == list(STEPS)
    assert all(name.startswith("lcray-reader") for name in reads.threads)


def test_the_next_interval_comes_whether_it_is_asked_for_or_not(run: Path) -> None:
    walk, _ = make(run)
    with walk:
        steps = [segment.end.step for segment, _ in walk.segments(Span(STEPS[:4]))]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(("small", "ahead"), [(1 << 24, 2), (0, 1)])
def test_reading_is_ahead_by_two_checkpoints_or_by_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, small: int, ahead: int
) -> None:
    monkeypatch.setattr(prefetch, "_SMALL", small)
    walk, reads = make(run)
    with walk:
        for number, (_, following) in enumerate(walk.segments(Span(STEPS))):
            expected_reads = min(number + 2 + ahead, len(STEPS))
            deadline = time.monotonic() + 30
            while len(reads.steps) < expected_reads and time.monotonic() < deadline:
                time.sleep(0.001)  # the thread is on its way
            assert len(reads.steps) == expected_reads
            following()


@pytest.mark.slow
def test_a_point_that_was_left_is_let_go(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_KEEP", 0)
    walk, _ = make(run)
    points = []
    with walk:
        for segment, following in walk.segments(Span(STEPS)):
            points.append(weakref.ref(segment.start.vector))
            following()
            del segment, following
            gc.collect()
            # The start of this interval goes with the next turn; those before are gone.
            assert all(point() is None for point in points[:-1])


@pytest.mark.parametrize("keep", [0, 1 << 24])
def test_small_spans_are_kept_and_large_ones_read_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(prefetch, "_KEEP", keep)
    walk, reads = make(run)
    with walk:
        for _ in walk.segments(Span(STEPS)):
            pass
        assert reads.steps == list(STEPS)
        assert [walk.again(step).tolist() for step in STEPS] == [expected(step) for step in STEPS]
    assert reads.steps == list(STEPS) * (1 if keep else 2)


def test_the_thread_ends_with_the_walk(run: Path) -> None:
    walk, _ = make(run)
    with walk:
        next(walk.segments(Span(STEPS)))
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("lcray-reader") for name in names)


def test_a_checkpoint_that_changes_while_it_is_analyzed_is_refused(run: Path) -> None:
    walk, _ = make(run)
    with walk:
        first = walk.read(3)
        assert first.vector.tolist() == expected(3)
        assert walk.read(3).vector.tolist() == expected(3)
        tensors = states()[3]
        save_file({**tensors, "bias": tensors["bias"] + 1}, run / "step-3.safetensors")
        with pytest.raises(CheckpointError, match="step 3: has changed since it was read first"):
            walk.read(3)
    again, _ = make(run, walk.hashes)
    with again, pytest.raises(CheckpointError, match="has changed"):
        list(again.segments(Span(STEPS)))


def test_errors_of_the_thread_are_raised_where_the_checkpoint_is_wanted(run: Path) -> None:
    (run / "step-5.safetensors").write_bytes(b"torn")
    walk, _ = make(run)
    seen = []
    with walk, pytest.raises(CheckpointError, match="step 5"):
        for segment, following in walk.segments(Span(STEPS)):
            seen.append(segment.end.step)
            following()
    assert seen == [1, 2, 3]


def test_a_type_that_differs_from_the_first_checkpoints_is_refused(run: Path) -> None:
    save_file({k: v.half() for k, v in states()[2].items()}, run / "step-2.safetensors")
    walk, _ = make(run)
    with walk, pytest.raises(CheckpointError, match=r"step 2: tensor 'bias' is torch.float16"):
        list(walk.segments(Span(STEPS)))
