from __future__ import annotations

import itertools
from collections import UserDict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lcray.tasks.data import pytree
from lcray.tasks.data.pytree import Digest, count_bytes, map_tensors


@dataclass(frozen=True)
class Record:
    x: Any
    note: str = "n"


class Named(NamedTuple):
    x: Any
    y: Any


def digest(*values: Any) -> str:
    found = Digest()
    for value in values:
        found.add(value)
    return found.hexdigest()


def test_mapping_keeps_the_kinds() -> None:
    value = {"a": [torch.ones(1), "word"], "b": Named(torch.ones(1), Record(torch.ones(1)))}
    found = map_tensors(lambda t: t + 1, value)
    assert found["a"][1] == "word" and isinstance(found["b"], Named)
    assert isinstance(found["b"].y, Record)
    assert [float(t) for t in (found["a"][0], found["b"].x, found["b"].y.x)] == [2.0] * 3
    assert float(value["b"].y.x) == 1.0, "the original is left alone"


def test_count_bytes() -> None:
    value = {
        "x": torch.zeros(2, 3),  # 24
        "more": (torch.zeros(5, dtype=torch.int64)[::2], "word", np.zeros(7, np.uint8)),  # 24 + 7
        "record": Record(torch.zeros(4, dtype=torch.bfloat16)),  # 8
    }
    assert count_bytes(value) == 24 + 24 + 7 + 8
    assert count_bytes("word") == 0


class TestDigest:
    DIFFERENT = (
        1,
        True,
        1.0,
        "1",
        b"1",
        None,
        [],
        [1],
        [1, 1],
        [[1], 1],
        [[1, 1]],
        ["a", "b"],
        ["ab"],
        ["a", "b", ""],
        {"a": 1},
        {"a": 1, "b": 2},
        {"b": 1},
        torch.tensor(1),
        torch.tensor([1]),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([1.0]),
        torch.zeros(0, 2),
        torch.zeros(2, 0),
        np.array([1.0]),
        np.array([[1.0]]),
        np.array([1.0], np.float32),
        np.array(["a", "b"], object),
        np.array(["a", "c"], object),
        np.array([["a"], ["b"]], object),
        Record(1),
        Record(2),
        Record(1, "m"),
    )

    def test_values_that_differ(self) -> None:
        found = [digest(value) for value in self.DIFFERENT]
        for (a, first), (b, second) in itertools.combinations(enumerate(found), 2):
            assert first != second, (self.DIFFERENT[a], self.DIFFERENT[b])

    def test_values_that_run_into_each_other(self) -> None:
        found = {digest(*v) for v in ([1, 23], [12, 3], ["a", "b"], ["ab"], [[1], 2], [[1, 2]])}
        assert len(found) == 6

    def test_every_element_counts(self) -> None:
        base = torch.arange(12.0).view(3, 4)
        found = {digest(base)}
        for i in range(12):
            other = base.clone()
            other.view(-1)[i] = -1
            found.add(digest(other))
        assert len(found) == 13

    @pytest.mark.parametrize("block", [1, 20, 1 << 24])
    @pytest.mark.parametrize(
        "kind", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.complex64]
    )
    def test_strides_do_not_count(
        self, kind: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pytree, "_BLOCK", block)
        base = (torch.arange(24) % 2).to(kind).view(2, 3, 4)
        strided = base.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        assert not strided.is_contiguous()
        assert digest(strided) == digest(base)
        assert digest(base.repeat_interleave(2, 0)[::2]) == digest(base)
        assert digest(base.transpose(0, 1)) != digest(base)
        assert digest(base[0, 0, 0]) == digest(base[0, 0, 0].clone())

    def test_gradients_do_not_matter(self) -> None:
        assert digest(torch.ones(2, requires_grad=True)) == digest(torch.ones(2))

    def test_pictures_are_read(self) -> None:
        class Picture:
            def __init__(self, pixels: np.ndarray) -> None:
                self.__array_interface__ = pixels.__array_interface__
                self.pixels = pixels

        light, dark = np.ones((2, 2), np.uint8), np.zeros((2, 2), np.uint8)
        found = Digest()
        found.add(Picture(light))
        assert found.opaque == 0
        assert digest(Picture(light)) == digest(Picture(light.copy())) != digest(Picture(dark))

    def test_what_cannot_be_read_is_counted(self) -> None:
        found = Digest()
        found.add([object(), {"a": PurePosixPath("x")}, {"not", "a", "sequence"}, 3])
        assert found.opaque == 3
        assert digest(object()) == digest(object()), "not its address"

    def test_mappings_of_any_kind(self) -> None:
        assert digest(UserDict(a=1)) == digest({"a": 1})


def test_mapping_a_tensor_alone() -> None:
    found: Tensor = map_tensors(lambda t: t * 2, torch.ones(2))
    assert found.tolist() == [2.0, 2.0]
