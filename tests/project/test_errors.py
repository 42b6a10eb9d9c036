from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

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
    brief,
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


def test_an_error_is_told_with_the_users_line(tmp_path: Path) -> None:
    """Between the user's line and the error lie frames of lcray's and of torch's."""
    source = "import torch\n\ndef fail():\n    return torch.nn.Linear(2, 3)(torch.ones(1, 4))\n"
    path = tmp_path / "users_file.py"
    path.write_text(source)
    space: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), space)
    with pytest.raises(RuntimeError) as caught:
        space["fail"]()
    assert brief(caught.value).startswith("RuntimeError: mat1 and mat2")
    assert brief(caught.value).endswith(" (users_file.py:4)")
    assert "\n" not in brief(caught.value)


def test_lines_of_the_package_are_not_the_users(tmp_path: Path) -> None:
    inside = Path(errors.__file__).parent / "task.py"
    library = tmp_path / "site-packages" / "lib" / "code.py"
    call = compile("inner()", str(tmp_path / "mine.py"), "exec")
    for foreign in (inside, library):
        space = {"__name__": "x"}
        exec(compile("def inner():\n    raise ValueError('a\\n b')", str(foreign), "exec"), space)
        with pytest.raises(ValueError, match="a") as caught:
            exec(call, space)
        assert brief(caught.value) == "ValueError: a b (mine.py:1)"
    assert brief(ValueError("never raised")) == "ValueError: never raised"
