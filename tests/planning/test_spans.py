"""How a run is cut into spans: their length, and how they taper."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lcray.planning.spans import choose_length, cut, cut_tapering, timed_length


@pytest.mark.parametrize(
    ("n", "workers", "length"),
    [
        (1000, 1, 250),  # a quarter of a worker's share
        (1000, 4, 63),
        (10_000, 1, 255),  # counted in 8 bits
        (1_000_000, 200, 255),
        (100, 8, 8),  # shorter ones pay too much for their first gradient
        (20, 4, 5),  # but no worker is left idle
        (36, 8, 5),
        (5, 4, 2),
        (1, 4, 1),
    ],
)
def test_by_number_alone(n: int, workers: int, length: int) -> None:
    assert choose_length(n, workers=workers) == length


@pytest.mark.parametrize(
    ("seconds", "length"),
    [
        (0.001, 255),  # over in a quarter of a second, but more cannot be counted
        (0.2, 255),
        (0.24, 250),  # a minute, and a quarter of a worker's share
        (0.5, 250),
        (1.0, 180),
        (7.0, 25),
        (60.0, 8),
        (1e6, 8),
        (0.0, 250),  # nobody knows
    ],
)
def test_by_duration(seconds: float, length: int) -> None:
    assert choose_length(10_000, workers=10, seconds=seconds) == length


@pytest.mark.parametrize(
    ("n", "seconds", "length"),
    [
        (32, 3.3, 16),  # a quarter of a share is 4 intervals, and a share less than a minute
        (40, 3.3, 18),  # a minute
        (80, 7.0, 10),
        (80, 8.0, 10),  # a quarter of a share, and more than a minute
        (40, 8.0, 8),
        (200, 0.015, 100),
    ],
)
def test_a_share_of_two_that_takes_a_minute_or_less_is_not_divided(
    n: int, seconds: float, length: int
) -> None:
    assert choose_length(n, workers=2, seconds=seconds) == length


@pytest.mark.parametrize(
    ("n", "workers", "length"), [(1000, 1, 248), (100, 1, 32), (20, 4, 8), (960, 1, 240)]
)
def test_whole_blocks(n: int, workers: int, length: int) -> None:
    assert choose_length(n, workers=workers, every=8) == length


@given(
    n=st.integers(1, 10**6),
    workers=st.integers(1, 300),
    every=st.sampled_from([0, 8]),
    seconds=st.none() | st.floats(0, 1e5),
    size=st.integers(0, 10**9),
)
def test_bounds(n: int, workers: int, every: int, seconds: float | None, size: int) -> None:
    length = choose_length(n, workers=workers, every=every, seconds=seconds, size=size)
    assert 1 <= length <= 255
    assert not every or length % every == 0
    if seconds:
        by_number = choose_length(n, workers=workers, every=every)
        assert length <= max(by_number, every) or (length - every) * seconds <= 60


def test_a_run_of_unknown_length() -> None:
    assert timed_length(2.0) == 90
    assert timed_length(1e-6) == 255
    assert timed_length(2.0, every=8) == 96
    assert timed_length(1e9) == timed_length(None) == 8


def lengths(n: int, length: int, every: int = 0) -> list[int]:
    return [len(span.intervals) for span in cut_tapering(range(n + 1), length, every)]


def test_the_last_quarter_in_halves_and_the_last_eighth_in_quarters() -> None:
    assert lengths(800, 40) == [40] * 15 + [20] * 5 + [10] * 10
    assert lengths(100, 25) == [25, 25, 25, 13, 12]  # a quarter of 25 would be too short
    assert lengths(100, 8) == [8] * 12 + [4]
    assert lengths(512, 64, every=8) == [64] * 6 + [32] * 2 + [16] * 4


@example(steps=[0, 1, 2, 3, 4, 5, 6, 7, 8], length=1, every=8)
@given(
    steps=st.lists(st.integers(0, 10**6), min_size=2, max_size=300, unique=True).map(sorted),
    length=st.integers(1, 255),
    every=st.sampled_from([0, 8]),
)
def test_they_cover_every_interval_once_and_never_grow(
    steps: list[int], length: int, every: int
) -> None:
    for spans in (cut_tapering(steps, length, every), cut(steps, length)):
        assert [pair for span in spans for pair in span.intervals] == list(pairwise(steps))
        sizes = [len(span.intervals) for span in spans]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] <= length
