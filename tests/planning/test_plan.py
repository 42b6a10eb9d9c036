from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcray.allocation.quadrature import RETIRED, RULES
from lcray.planning.check import read_plan
from lcray.planning.costs import shares_pass, vector_bytes
from lcray.planning.plan import Plan, Span, SplitPlan, memory_format_of
from lcray.settings import Settings
from lcray.tasks.layer import Layer

NAMES = st.text(min_size=1, max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 10**12)


def tuples(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(values, max_size=4).map(tuple)


SETTINGS = st.builds(
    Settings,
    rule=st.sampled_from([*RULES, *RETIRED, "rk4", "simpson*4096"]),
    refine=st.booleans(),
    rtol=FLOATS,
    max_panels=COUNTS,
    splits=st.none() | tuples(NAMES),
    layers=st.none() | NAMES,
    batch_norm=NAMES,
    dtype=st.sampled_from(["float32", "float64"]),
    batch_size=st.none() | COUNTS,
    memory_format=NAMES,
    batch_seed=COUNTS,
    partial=st.booleans(),
    window=st.none() | COUNTS,
    elements=st.booleans(),
    parameters=st.none() | st.booleans(),
    units=st.booleans(),
    trace=tuples(NAMES),
    trace_seed=COUNTS,
    deterministic=st.booleans(),
)
LAYERS = st.builds(
    Layer,
    NAMES,
    NAMES,
    st.sampled_from(["parameter", "buffer"]),
    tuples(st.integers(0, 9)).map(lambda shape: (2, 3, *shape)),
    st.none() | st.integers(0, 1),
    st.booleans(),
    tuples(NAMES),
)
SPLITS = st.builds(
    SplitPlan,
    NAMES,
    COUNTS,
    COUNTS,
    FLOATS,
    st.none() | FLOATS,
    COUNTS,
    tuples(st.integers(-(2**63), 2**63 - 1)),
    tuples(FLOATS),
    st.booleans(),
)


def spans(steps: list[int]) -> tuple[Span, ...]:
    """The first interval, and the rest if there is any."""
    steps = sorted(steps)
    return tuple(Span(tuple(part)) for part in (steps[:2], steps[1:]) if len(part) > 1)


def distinct(values: st.SearchStrategy) -> st.SearchStrategy:
    by_name = {"unique_by": lambda value: value.name}
    return st.lists(values, min_size=1, max_size=4, **by_name).map(tuple)


PLANS = st.builds(
    Plan,
    settings=SETTINGS,
    layers=distinct(LAYERS),
    splits=distinct(SPLITS),
    spans=st.lists(COUNTS, min_size=2, max_size=8, unique=True).map(spans),
    window=st.integers(1, 1000),
    tables=tuples(NAMES),
    unit_layers=tuples(NAMES),
    detail_layers=tuples(NAMES),
    trace_sample=COUNTS,
    threads=st.integers(1, 64),
    device_kind=NAMES,
    batch_size=st.integers(1, 10**12),
    memory_format=NAMES,
)


@given(PLANS)
def test_a_plan_survives_json_exactly(plan: Plan) -> None:
    text = json.dumps(plan.to_dict())
    again = read_plan(json.loads(text))
    assert again == plan
    assert hash(again) == hash(plan), "tuples stay tuples"
    assert json.dumps(again.to_dict()) == text


def test_every_field_is_kept(plan: Plan) -> None:
    """A field that `to_dict` forgot would come back as its default."""
    data = plan.to_dict()
    assert set(data) == set(Plan.__dataclass_fields__)
    assert set(data["settings"]) == set(Settings.__dataclass_fields__)


@pytest.fixture
def plan() -> Plan:
    return make(spans=(Span((2, 3, 5)), Span((5, 8)), Span((8, 9, 10, 30))))


def make(**fields: Any) -> Plan:
    known: dict = {"tables": (), "unit_layers": (), "detail_layers": (), "trace_sample": 0}
    known |= {"settings": Settings(), "layers": (), "splits": (), "window": 10}
    return Plan(**{**known, **fields})


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((4, 3, 2), 1, 3), ((4, 3), 0, 2), ((0, 3), 1, 2**40), ((4,), None, 2), ((4, 3), 1, 0)],
)
def test_groups_of_units_must_be_of_the_first_axis(
    shape: tuple[int, ...], axis: int | None, groups: int
) -> None:
    up = Layer("up", "", "parameter", (4, 3, 2), 1, True, (), 2)
    split = SplitPlan("train", 8, 8, 8.0, 2.0, 1)
    sound = make(spans=(Span((0, 1)),), layers=(up,), splits=(split,), trace_sample=1).to_dict()
    assert read_plan(sound).layers[0].n_units == 6
    with pytest.raises(ValueError, match="'up' with impossible groups of units"):
        sound["layers"][0] |= {"shape": list(shape), "unit_axis": axis, "unit_groups": groups}
        read_plan(sound)


def test_steps_and_intervals_across_spans(plan: Plan) -> None:
    assert plan.steps == (2, 3, 5, 8, 9, 10, 30)
    assert plan.n_intervals == 6
    assert [span.intervals for span in plan.spans] == [
        ((2, 3), (3, 5)),
        ((5, 8),),
        ((8, 9), (9, 10), (10, 30)),
    ]


def test_spans_are_named_so_that_names_sort_as_numbers() -> None:
    spans = [Span((9, 10)), Span((10, 11)), Span((99_999, 100_000))]
    assert [span.name for span in spans] == [
        "00000009-00000010",
        "00000010-00000011",
        "00099999-00100000",
    ]
    assert (spans[0].first, spans[0].last) == (9, 10)


@pytest.mark.parametrize(
    ("start", "window"), [(0, 0), (9, 0), (10, 10), (19, 10), (100, 100), (123, 120)]
)
def test_an_interval_is_in_the_window_of_its_start(plan: Plan, start: int, window: int) -> None:
    assert plan.window_of(start) == window


@pytest.mark.parametrize(
    ("size", "n_splits", "dtype", "n_bytes"),
    [
        (1000, 1, "float32", 63_000),
        (1000, 1, "float64", 126_000),
        (1000, 3, "float32", 63_000 + 2 * 27_000),
        (1000, 3, "float64", 2 * (63_000 + 2 * 27_000)),
        # 2.4 million elements: 27 bytes of each are 64.8 MB, below 64 MiB; twice that is not.
        (2_400_000, 2, "float32", 2_400_000 * (63 + 27)),
        (2_400_000, 3, "float32", 2_400_000 * 63),
    ],
)
def test_memory_for_vectors(size: int, n_splits: int, dtype: str, n_bytes: int) -> None:
    assert vector_bytes(size, n_splits, dtype) == n_bytes
    assert shares_pass(size, n_splits) is (size < 10_000 or n_splits < 3)


def test_sums_in_parts_take_a_float64_vector_more() -> None:
    for dtype in ("float32", "float64"):
        whole = vector_bytes(1000, 2, dtype)
        assert vector_bytes(1000, 2, dtype, 2) == vector_bytes(1000, 2, dtype, 9) == whole + 8000


def test_any_memory_format_is_none_in_particular() -> None:
    asked = [Settings(), Settings(memory_format="contiguous")]
    assert [memory_format_of(settings) for settings in asked] == [None, "contiguous"]


@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(-9, 9), min_size=1, max_size=5))
def test_a_span_has_the_steps_that_it_was_given(steps: list[int]) -> None:
    """However they are kept: evenly spaced ones, those that turn back, and those far apart."""
    even = range(steps[0], steps[0] + 3 * (abs(steps[-1]) % 99) + 1, 1 + abs(steps[-1]) % 7)
    for given_steps in (steps, [*even]):
        span = Span(given_steps)
        assert span.steps == tuple(given_steps)
        assert (span.first, span.last) == (given_steps[0], given_steps[-1])
        assert span.n_intervals == len(given_steps) - 1
        assert span.intervals == tuple(pairwise(given_steps))
        assert span == Span(tuple(given_steps)) and hash(span) == hash(Span(tuple(given_steps)))


def test_evenly_spaced_steps_take_no_room_each() -> None:
    """Compared as they are sent to workers; a million steps would be megabytes."""
    even, uneven = Span(range(0, 10**6, 10)), Span([*range(0, 10**6, 10), 10**6 + 1])
    assert len(pickle.dumps(even)) < 500 < 100_000 < len(pickle.dumps(uneven))
    assert pickle.loads(pickle.dumps(even)) == even


def test_spans_differ_by_their_steps() -> None:
    assert Span((0, 1, 2)) != Span((0, 2)) != Span((0, 1, 3)) != (0, 1, 3)
    assert [type(step) for step in Span((0, True, 2)).steps] == [int, bool, int]


@pytest.mark.parametrize("steps", [range(0, 10**6, 10), [0, 1, 3], [7]], ids=repr)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint32])
def test_steps_of_numpy_are_integers(steps: Sequence[int], kind: type[np.integer[Any]]) -> None:
    found, wanted = Span([kind(step) for step in steps]), Span(steps)
    assert found == wanted and hash(found) == hash(wanted)
    assert Span(np.array(steps, kind)) == Span([steps[0], *map(kind, steps[1:])]) == wanted
    assert {*map(type, found.steps)} == {int}
    assert pickle.dumps(found) == pickle.dumps(wanted)
