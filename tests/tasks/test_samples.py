from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from lcray.errors import TaskError
from lcray.tasks.data.pytree import Digest
from lcray.tasks.data.samples import TensorSamples, open_samples
from lcray.tasks.task import Task


def task_of(collate: Callable | None = None) -> Task:
    return Task(lambda: nn.Linear(1, 1), {}, lambda net, b: b, None, collate)


def hashed(data: Any, collate: Callable | None = None, chunk: int = 4) -> str:
    digest = Digest()
    for _ in open_samples("train", data, task_of(collate)).scan(digest, chunk):
        pass
    return digest.hexdigest()


class Made(Dataset):
    """Samples made anew at every reading."""

    def __init__(self, make: Callable[[int], Any], n: int = 40) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Example:
    """A sample that only its collate function understands."""

    def __init__(self, value: float) -> None:
        self.value = value


class TestDataSetsOfTensors:
    def test_their_batches_are_what_collating_gives(self) -> None:
        data = TensorDataset(torch.randn(7, 2), torch.arange(7))
        samples = open_samples("train", data, task_of())
        assert isinstance(samples, TensorSamples)
        for index in (range(2, 6), np.array([5, 0, 3])):
            found = samples.batch(index, "")
            expected = default_collate([data[int(i)] for i in index])
            assert type(found) is type(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_a_collate_function_is_called(self) -> None:
        data = TensorDataset(torch.arange(3))
        samples = open_samples("train", data, task_of(lambda rows: len(rows)))
        assert samples.batch(range(3), "") == 3

    def test_one_that_makes_something_of_its_tensors_is_read(self) -> None:
        class Doubled(TensorDataset):
            def __getitem__(self, index: int) -> Any:
                return (2 * self.tensors[0][index],)

        samples = open_samples("train", Doubled(torch.arange(3)), task_of())
        assert samples.batch(range(3), "")[0].tolist() == [0, 2, 4]


class TestHash:
    def test_every_sample_counts(self) -> None:
        plain = hashed(Made(lambda i: {"x": torch.tensor(i), "word": "w"}))
        for changed in (0, 3, 4, 17, 39):
            other = Made(lambda i, c=changed: {"x": torch.tensor(i), "word": "w" * (1 + (i == c))})
            assert hashed(other) != plain

    def test_the_order_counts(self) -> None:
        assert hashed([1, 2, 3]) != hashed([1, 3, 2])
        assert hashed((torch.tensor([1, 2]),)) != hashed((torch.tensor([2, 1]),))

    def test_columns_count(self) -> None:
        x, y = torch.zeros(3), torch.ones(3)
        assert len({hashed((x, y)), hashed((y, x)), hashed((x,)), hashed((x, y, y))}) == 4

    def test_objects_count_by_their_batches(self) -> None:
        def collate(rows: list[Example]) -> Tensor:
            return torch.tensor([row.value for row in rows])

        data = Made(lambda i: Example(i + 0.0))
        plain = hashed(data, collate)
        assert hashed(data, collate, chunk=7) == plain
        for changed in (0, 39):
            other = Made(lambda i, c=changed: Example(i + 0.5 * (i == c)))
            assert hashed(other, collate) != plain

    def test_what_the_collate_function_makes_counts(self) -> None:
        texts = [f"text {i}" for i in range(40)]
        hashes = {
            hashed(texts, lambda rows, base=base: torch.tensor([hash_of(r, base) for r in rows]))
            for base in (31, 37)
        }
        assert len(hashes) == 2

    def test_collate_functions_may_take_samples_apart(self) -> None:
        def collate(rows: list[dict[str, Any]]) -> Any:
            return {"y": torch.tensor([row.pop("y") for row in rows]), "x": default_collate(rows)}

        data = Made(lambda i: {"x": i, "y": i})
        samples = open_samples("train", data, task_of(collate))
        digest = Digest()
        batches = [make() for _, make in samples.scan(digest, 16)]
        assert torch.cat([batch["y"] for batch in batches]).tolist() == list(range(40))

    def test_shuffling_in_the_collate_function_is_refused(self) -> None:
        def collate(rows: list[int]) -> Tensor:
            return torch.tensor(rows)[torch.randperm(len(rows))]

        with pytest.raises(TaskError, match="differ when read twice"):
            hashed(Made(lambda i: i), collate, chunk=40)


def hash_of(text: str, base: int) -> int:
    found = 0
    for letter in text:
        found = (found * base + ord(letter)) % 65521
    return found


class TestScan:
    @pytest.mark.parametrize("data", [(torch.arange(10),), Made(lambda i: (i,), 10)])
    def test_batches_of_every_chunk(self, data: Any) -> None:
        scan = open_samples("train", data, task_of()).scan(Digest(), 4)
        found = [(size, make()[0].tolist()) for size, make in scan]
        assert found == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (2, [8, 9])]

    def test_no_batch_is_made_that_nobody_wants(self) -> None:
        sizes = []

        def collate(rows: list[int]) -> int:
            sizes.append(len(rows))
            return 0

        hashed(Made(lambda i: i), collate, chunk=5)
        assert sizes == [5, 5, 16], "the check for augmentation, twice, and the hash of a few"
