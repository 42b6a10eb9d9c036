"""JSON as dataclasses: every value is of the type that its field declares, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from lcray.storage.json_types import build


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    inner: tuple[Inner, ...]
    named: Mapping[str, Inner]
    note: str | None = None


DATA: dict[str, Any] = {
    "name": "a",
    "share": 1,
    "inner": [{"size": 3}],
    "named": {"b": {"size": 4}},
}


def test_objects_within_objects() -> None:
    assert build(Outer, DATA) == Outer("a", 1, (Inner(3),), {"b": Inner(4)})
    assert build(Outer, DATA | {"note": "c", "inner": []}).note == "c"


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 1},
        {"name": "\ud800"},
        {"share": "1"},
        {"share": True},
        {"share": float("nan")},
        {"share": float("inf")},
        {"share": 2**63},
        {"inner": {}},
        {"inner": [3]},
        {"inner": [{"size": 3.0}]},
        {"inner": [{"size": 2**63}]},
        {"inner": [{}]},
        {"inner": [{"size": 3, "more": 1}]},
        {"named": []},
        {"named": {"b": 3}},
        {"named": {"\ud800": {"size": 4}}},
        {"note": 3},
        {"more": 1},
    ],
    ids=ascii,
)
def test_what_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        build(Outer, DATA | wrong)
    with pytest.raises((TypeError, ValueError)):
        build(Outer, {name: value for name, value in DATA.items() if name != "inner"})


@pytest.mark.parametrize("data", [None, [], "a", 3])
def test_what_is_no_object(data: object) -> None:
    with pytest.raises(TypeError, match="not an object where Outer should be"):
        build(Outer, data)
