"""The draw of samples and replicates, by counting; and that nothing else of a split is read."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lcray.errors import TaskError, UsageError
from lcray.tasks.data.sampling import MOST_REPLICATES, Draw, draw
from lcray.tasks.data.split import open_split
from lcray.tasks.task import Task


def drawn(name: str, population: int, samples: int, seed: int = 0) -> Draw:
    found = draw(name, population, samples, seed)
    assert found is not None
    return found


class TestDraw:
    @pytest.mark.parametrize(("population", "samples"), [(3, 2), (50, 19), (1000, 87), (10**9, 41)])
    def test_distinct_samples_in_replicates_of_equal_size(
        self, population: int, samples: int
    ) -> None:
        found = drawn("train", population, samples)
        assert found.population == population and len(found.numbers) == samples
        assert (np.diff(found.numbers) > 0).all()
        assert found.numbers[0] >= 0 and found.numbers[-1] < population
        sizes = Counter(found.replicates.tolist())
        assert found.n_replicates == len(sizes) == min(MOST_REPLICATES, samples)
        assert max(sizes.values()) - min(sizes.values()) <= 1

    @pytest.mark.parametrize("samples", [None, 7, 8])
    def test_all_where_there_are_no_more(self, samples: int | None) -> None:
        assert draw("train", 7, samples, 0) is None

    def test_a_seed_decides_and_so_do_the_name_and_the_number(self) -> None:
        first = drawn("train", 1000, 30)
        again = drawn("train", 1000, 30)
        assert np.array_equal(first.numbers, again.numbers)
        assert np.array_equal(first.replicates, again.replicates)
        for other in (
            drawn("train", 1000, 30, 1),
            drawn("val", 1000, 30),
            drawn("train", 1000, 31),
        ):
            # 30 of 1000 twice have 0.9 in common, on average.
            assert len(np.intersect1d(first.numbers, other.numbers)) < 8

    def test_every_sample_and_every_pair_is_as_likely(self) -> None:
        population, samples, times = 6, 3, 4000
        alone = np.zeros(population)
        together = np.zeros((population, population))
        places = np.zeros((population, samples))
        for seed in range(times):
            found = drawn("train", population, samples, seed)
            alone[found.numbers] += 1
            together[np.ix_(found.numbers, found.numbers)] += 1
            places[found.numbers, found.replicates] += 1

        def likely(counts: Any, chance: float) -> bool:
            spread = math.sqrt(times * chance * (1 - chance))
            return bool((abs(counts - times * chance) < 4.5 * spread).all())

        assert likely(alone, 1 / 2)
        assert likely(together[~np.eye(population, dtype=bool)], 3 * 2 / (6 * 5))
        assert likely(places, 1 / 2 / 3)  # in each replicate


class Numbers(Dataset[Tensor]):
    """Sample i is i; keeps which were read."""

    def __init__(self, n: int, broken: bool = False) -> None:
        self.n, self.broken, self.read = n, broken, set[int]()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        self.read.add(i)
        if self.broken:
            raise OSError("torn")
        return torch.tensor(float(i))


def task_of(**parts: Any) -> Task:
    return Task(lambda: torch.nn.Linear(1, 1), {}, lambda model, batch: batch, **parts)


def values(batch: Any) -> Tensor:
    return torch.as_tensor(batch[0] if isinstance(batch, (tuple, list)) else batch)


class TestReading:
    @pytest.mark.parametrize(
        "make",
        [
            lambda n: (torch.arange(float(n)),),
            lambda n: (np.arange(float(n), dtype=np.float32),),
            lambda n: TensorDataset(torch.arange(float(n))),
            Numbers,
        ],
        ids=["tensors", "arrays", "tensor data set", "data set"],
    )
    def test_the_samples_that_were_drawn_and_no_others(self, make: Any) -> None:
        data, expected = make(500), drawn("train", 500, 60, 4)
        source = open_split("train", data, task_of(), fixed_seed=None, samples=60, sample_seed=4)
        split = source.cut(2, place=lambda t: t)
        found: dict[int, list[float]] = {}
        for replicate, batch in zip(split.replicates, split.batches, strict=True):
            found.setdefault(replicate, []).extend(values(batch).tolist())
        assert found == {
            k: expected.numbers[expected.replicates == k].tolist() for k in range(MOST_REPLICATES)
        }
        assert (split.n_samples, split.drawn_from, split.n_replicates) == (60, 500, 20)
        if isinstance(data, Numbers):
            assert data.read == set(expected.numbers.tolist())

    def test_the_hash_is_that_of_the_samples(self) -> None:
        def sha256(data: Tensor, seed: int = 0) -> str:
            task = task_of()
            return open_split(
                "train", (data,), task, fixed_seed=None, samples=10, sample_seed=seed
            ).sha256

        data = torch.arange(100.0)
        taken = drawn("train", 100, 10).numbers
        before = sha256(data)
        assert sha256(data, 1) != before
        other = data.clone()
        other[np.setdiff1d(np.arange(100), taken)] = -1
        assert sha256(other) == before
        other[taken[3]] = -1
        assert sha256(other) != before

    def test_an_error_names_the_sample_as_the_data_set_does(self) -> None:
        first = drawn("train", 500, 60).numbers[0]
        with pytest.raises(TaskError, match=rf"sample {first} cannot be read: OSError: torn"):
            open_split("train", Numbers(500, True), task_of(), fixed_seed=None, samples=60)

    def test_batches_hold_one_replicate_and_one_group(self) -> None:
        data = torch.arange(500)
        task = task_of(groups=lambda batch: batch[0] % 3)
        source = open_split("train", (data,), task, fixed_seed=None, samples=130)
        split = source.cut(4, place=lambda t: t)
        assert split.sorted_by_group and split.groups == (0, 1, 2)
        expected = drawn("train", 500, 130)
        replicate_of = dict(zip(expected.numbers, expected.replicates, strict=True))
        seen = []
        for replicate, label, batch in zip(
            split.replicates, split.labels, split.batches, strict=True
        ):
            numbers = batch[0].tolist()
            assert {replicate_of[number] for number in numbers} == {replicate}
            assert {number % 3 for number in numbers} == set(label.tolist())
            assert len(label) == len(numbers) <= 4
            seen += numbers
        assert sorted(seen) == expected.numbers.tolist()

    def test_where_batches_are_part_of_the_loss_samples_are_not_drawn(self) -> None:
        data = (torch.arange(30.0),)
        with pytest.raises(UsageError, match=r"samples 29: .* use --batch-norm running, or all of"):
            open_split("train", data, task_of(), fixed_seed=0, samples=29)
        split = open_split("train", data, task_of(), fixed_seed=0, samples=30)
        assert split.n_samples == 30 and split.draw is None
