from __future__ import annotations

import inspect

import pytest

from lcray import errors
from lcray.errors import (
    CheckpointError,
    CorruptionError,
    IncompleteError,
    LcrayError,
    OutputError,
    RecorderError,
    TaskError,
    UsageError,
    suggest,
)


def test_every_error_can_be_caught_as_one() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    ]
    assert {UsageError, CheckpointError, RecorderError, TaskError, OutputError} <= set(kinds)
    assert all(issubclass(kind, LcrayError) for kind in kinds)


def test_incomplete_and_corrupt_outputs_are_output_errors_and_usage_is_not() -> None:
    assert issubclass(IncompleteError, OutputError)
    assert issubclass(CorruptionError, OutputError)
    assert not issubclass(UsageError, OutputError | TaskError | CheckpointError)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("simpsom", "simpson"), ("gaus", "gauss"), ("trapezoi", "trapezoid")],
)
def test_the_nearest_name_is_suggested(name: str, nearest: str) -> None:
    message = suggest(name, ["simpson", "gauss", "trapezoid"], "rule")
    assert message == (
        f"unknown rule {name!r}: did you mean {nearest!r}? valid: simpson, gauss, trapezoid"
    )


def test_a_name_far_from_all_gets_the_list_alone() -> None:
    assert suggest("zzz", ["train", "val"], "split") == "unknown split 'zzz': valid: train, val"


def test_long_lists_are_cut_after_twelve_and_say_so() -> None:
    names = [f"block{number}" for number in range(13)]
    message = suggest("?", names, "layer")
    assert "block11, …" in message and "block12" not in message
    assert "…" not in suggest("?", names[:12], "layer")


def test_names_may_come_from_an_iterator() -> None:
    assert suggest("vall", iter(["train", "val"]), "split").endswith("valid: train, val")
