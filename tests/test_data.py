from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lcray import data as data_module
from lcray.data import SplitData, prepare_split
from lcray.errors import TaskError
from lcray.task import Task


def prepare(
    data: Any,
    *,
    groups: Callable | None = None,
    collate: Callable | None = None,
    batch_size: int = 3,
    fixed_seed: int | None = None,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    name: str = "train",
) -> SplitData:
    task = Task(lambda: nn.Linear(1, 1), {name: data}, lambda net, b: b, groups, collate)
    return prepare_split(
        name, data, task, batch_size=batch_size, fixed_seed=fixed_seed, place=place
    )


def refusal(data: Any, **settings: Any) -> str:
    with pytest.raises(TaskError) as caught:
        prepare(data, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def samples(found: SplitData) -> list[int]:
    """The first column of every batch: the tests number the samples there."""
    return [int(i) for batch in found.batches for i in batch[0]]


class TestCutting:
    @given(n=st.integers(1, 60), batch_size=st.integers(1, 25), seed=st.none() | st.integers(0, 9))
    def test_every_sample_once_in_batches_of_nearly_one_size(
        self, n: int, batch_size: int, seed: int | None
    ) -> None:
        found = prepare((torch.arange(n),), batch_size=batch_size, fixed_seed=seed)
        assert sorted(samples(found)) == list(range(n))
        sizes = found.batch_sizes
        assert [len(batch[0]) for batch in found.batches] == list(sizes)
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
        assert len(sizes) == -(-n // batch_size), "no more batches than needed"
        assert found.n_samples == n

    def test_the_natural_order_is_kept(self) -> None:
        assert samples(prepare((torch.arange(10),))) == list(range(10))

    @given(
        labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), batch_size=st.integers(1, 9)
    )
    def test_sorted_groups_are_cut_evenly_too(self, labels: list[int], batch_size: int) -> None:
        columns = (torch.arange(len(labels)), torch.tensor(labels))
        found = prepare(columns, groups=lambda b: b[1], batch_size=batch_size)
        assert found.sorted_by_group
        assert sorted(samples(found)) == list(range(len(labels)))
        for group in set(labels):
            sizes = [len(t) for t in found.labels if int(t[0]) == group]
            assert sum(sizes) == labels.count(group)
            assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
        for batch, own in zip(found.batches, found.labels, strict=True):
            assert torch.equal(own, batch[1]) and len(set(own.tolist())) == 1
        assert found.groups == tuple(sorted(set(labels)))


class TestPermutation:
    """Where batches are part of the loss (batch statistics)."""

    def test_it_is_seeded_and_differs_between_seeds_and_splits(self) -> None:
        data = (torch.arange(50),)
        orders = [
            samples(prepare(data, fixed_seed=seed, name=name))
            for seed, name in ((0, "train"), (0, "train"), (1, "train"), (0, "val"))
        ]
        assert orders[0] == orders[1]
        assert len({tuple(order) for order in orders}) == 3
        assert orders[0] != list(range(50))

    def test_the_global_generators_play_no_part(self) -> None:
        data = (torch.arange(50),)
        torch.manual_seed(1)
        np.random.seed(1)
        first = samples(prepare(data, fixed_seed=0))
        state = torch.get_rng_state()
        torch.manual_seed(2)
        np.random.seed(2)
        assert samples(prepare(data, fixed_seed=0)) == first
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state), "and none is drawn from"

    def test_groups_do_not_change_it(self) -> None:
        data = (torch.arange(30), torch.arange(30) % 3)
        with_groups = prepare(data, groups=lambda b: b[1], fixed_seed=4)
        assert samples(with_groups) == samples(prepare(data, fixed_seed=4))
        assert not with_groups.sorted_by_group
        assert [t.tolist() for t in with_groups.labels] == [
            b[1].tolist() for b in with_groups.batches
        ]


class TestSortingByGroup:
    def test_several_items_a_sample(self) -> None:
        data = (torch.arange(5), torch.tensor([7, 2, 7, 2, 9]))
        found = prepare(data, groups=lambda b: b[1].repeat_interleave(3), batch_size=2)
        assert found.sorted_by_group
        assert samples(found) == [1, 3, 0, 2, 4]
        assert [t.tolist() for t in found.labels] == [[2] * 6, [7] * 6, [9] * 3]

    def test_labels_that_differ_within_a_sample(self) -> None:
        data = (torch.arange(6), torch.arange(6) % 2)
        found = prepare(data, groups=lambda b: torch.stack([b[1], b[1] + 1], 1).flatten())
        assert not found.sorted_by_group
        assert samples(found) == list(range(6))
        assert found.groups == (0, 1, 2)

    def test_one_sample_in_the_middle_is_enough(self) -> None:
        data = (torch.arange(5), torch.tensor([1, 0, 1, 0, 1]))
        mixed = (torch.arange(5) == 2).long()
        found = prepare(
            (*data, mixed), groups=lambda b: torch.stack([b[1], b[1] + b[2]], 1).flatten()
        )
        assert not found.sorted_by_group and samples(found) == list(range(5))

    def test_items_that_do_not_come_sample_by_sample(self) -> None:
        # Position by position: the second item of sample 0 follows the first one of the last.
        data = (torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1]))
        found = prepare(data, groups=lambda b: b[1].repeat(2))
        assert not found.sorted_by_group and samples(found) == list(range(6))

    def test_labels_that_look_sample_by_sample_by_chance(self) -> None:
        # [0, 0, 1, 1] twice in a row reads as samples 0, 1, 0, 1 when taken two by two.
        data = (torch.arange(4), torch.tensor([0, 0, 1, 1]))
        found = prepare(data, groups=lambda b: b[1].repeat(2), batch_size=4)
        pure = all(len(set(own.tolist())) == 1 for own in found.labels)
        assert found.sorted_by_group == pure
        assert sorted(samples(found)) == [0, 1, 2, 3]

    def test_a_number_of_items_that_varies(self) -> None:
        rows = [[5], [5, 5], [6], [6, 6]]
        found = prepare(
            rows,
            groups=lambda b: torch.tensor([i for row in b for i in row]),
            collate=lambda rows: rows,
        )
        assert not found.sorted_by_group
        assert torch.cat(found.labels).tolist() == [5, 5, 5, 6, 6, 6]

    def test_batches_whose_items_look_even(self) -> None:
        # Samples of 1 and 3 items make 4 of two samples, but of one sample they show.
        rows = [[5], [5, 5, 6]]
        found = prepare(
            rows,
            groups=lambda b: torch.tensor([i for row in b for i in row]),
            collate=lambda rows: rows,
            batch_size=2,
        )
        assert not found.sorted_by_group and found.groups == (5, 6)

    def test_items_in_another_order_than_the_samples(self) -> None:
        data = (torch.arange(3), torch.tensor([0, 1, 2]))
        assert not prepare(data, groups=lambda b: b[1].flip(0)).sorted_by_group

    def test_no_groups_no_labels(self) -> None:
        found = prepare((torch.arange(4),))
        assert (found.labels, found.groups, found.sorted_by_group) == ((), (), False)

    def test_negative_labels_are_no_group(self) -> None:
        data = (torch.arange(4), torch.tensor([-1, 3, -100, 0]))
        found = prepare(data, groups=lambda b: b[1])
        assert found.groups == (0, 3)
        assert torch.cat(found.labels).tolist() == [-100, -1, 0, 3]


class TestGroupLabels:
    DATA = (torch.arange(4), torch.tensor([0, 1, 0, 1]))

    @pytest.mark.parametrize(
        ("groups", "shown"),
        [
            (lambda b: b[1].float(), "gave torch.float32 [4]"),
            (lambda b: b[1].float() * 1j, "gave torch.complex64 [4]"),
            (lambda b: b[1][:, None], "gave torch.int64 [4, 1]"),
            (lambda b: b[1].sum(), "gave torch.int64 []"),
            (lambda b: b[1].tolist(), "gave list"),
            (lambda b: None, "gave NoneType"),
        ],
    )
    def test_of_another_kind(self, groups: Callable, shown: str) -> None:
        message = refusal(self.DATA, groups=groups, batch_size=4)
        assert message.startswith("task groups: must give one integer per item, [n], ")
        assert shown in message and message.endswith("on split 'train'")

    def test_that_fail(self) -> None:
        message = refusal(self.DATA, groups=lambda b: b["label"])
        assert message.startswith("task groups: failed on split 'train': TypeError: tuple indices")

    def test_too_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data_module, "MAX_GROUPS", 5)
        assert len(prepare((torch.arange(5),), groups=lambda b: b[0]).groups) == 5
        message = refusal((torch.arange(6),), groups=lambda b: b[0])
        assert message == "task groups: 6 groups in split 'train'; at most 5"

    def test_booleans_and_small_integers_are_fine(self) -> None:
        found = prepare((torch.tensor([True, False]),), groups=lambda b: b[0])
        assert found.groups == (0, 1)
        found = prepare((torch.tensor([3, 2], dtype=torch.uint8),), groups=lambda b: b[0])
        assert found.groups == (2, 3)


class Pair(NamedTuple):
    number: Tensor
    square: Tensor


class Squares(Dataset):
    def __init__(self, make: Callable[[int, int], Any], n: int = 5) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.make(index, index * index)


class TestKindsOfData:
    """Five samples i with i²; each kind of batch is read the way its user would."""

    def check(self, found: SplitData, read: Callable[[Any], tuple[Any, Any]]) -> None:
        pairs = [read(batch) for batch in found.batches]
        assert [int(i) for part, _ in pairs for i in part] == [0, 1, 2, 3, 4]
        assert [int(i) for _, part in pairs for i in part] == [0, 1, 4, 9, 16]

    def test_tensors_arrays_and_lists(self) -> None:
        i = np.arange(5)
        self.check(prepare((torch.from_numpy(i), i**2)), lambda b: (b[0], b[1]))
        self.check(prepare((i.tolist(), (i**2).tolist())), lambda b: (b[0], b[1]))
        assert isinstance(prepare((i,)).batches[0][0], Tensor)

    def test_a_named_tuple_of_tensors_keeps_its_names(self) -> None:
        data = Pair(torch.arange(5), torch.arange(5) ** 2)
        self.check(prepare(data), lambda b: (b.number, b.square))

    def test_a_data_set_of_tuples(self) -> None:
        data = TensorDataset(torch.arange(5), torch.arange(5) ** 2)
        self.check(prepare(data), lambda b: (b[0], b[1]))

    def test_a_data_set_of_named_tuples(self) -> None:
        data = Squares(lambda i, j: Pair(torch.tensor(i), torch.tensor(j)))
        self.check(prepare(data), lambda b: (b.number, b.square))

    def test_a_data_set_of_dictionaries(self) -> None:
        data = Squares(lambda i, j: {"i": i, "inner": {"j": np.float32(j)}, "text": "word"})
        found = prepare(data)
        self.check(found, lambda b: (b["i"], b["inner"]["j"]))
        assert found.batches[0]["text"] == ["word"] * 3, "what is no tensor stays"

    def test_a_collate_function_that_gives_a_mapping(self) -> None:
        def collate(rows: list[int]) -> UserDict:  # what a tokenizer gives
            return UserDict(i=torch.tensor(rows), j=[torch.tensor(rows) ** 2])

        data = Squares(lambda i, j: i)
        self.check(prepare(data, collate=collate), lambda b: (b["i"], b["j"][0]))

    def test_a_list_of_samples(self) -> None:
        self.check(prepare([(i, i * i) for i in range(5)]), lambda b: (b[0], b[1]))

    def test_words_in_a_tuple(self) -> None:
        message = refusal((["a", "b"],))
        assert message.startswith("task split 'train': must hold tensors or arrays of numbers: ")

    def test_samples_that_do_not_make_a_batch(self) -> None:
        data = Squares(lambda i, j: torch.ones(i + 1))
        message = refusal(data)
        assert message.startswith(
            "task split 'train': samples 0…2 cannot be made into a batch: RuntimeError: "
        )

    def test_a_data_set_that_raises(self) -> None:
        def make(i: int, j: int) -> int:
            if i == 4:
                raise OSError("disk\ngone")
            return i

        assert "samples 3…4 cannot be made into a batch: OSError: disk gone" in refusal(
            Squares(make)
        )

    def test_every_tensor_is_placed_and_nothing_else(self) -> None:
        data = Squares(lambda i, j: {"i": torch.tensor(i), "more": [Pair(torch.ones(1), 2.0)]})
        seen = []

        def place(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor.double()

        batch = prepare(data, batch_size=5, place=place, collate=lambda rows: rows).batches[0]
        assert len(seen) == 2 * 5
        assert batch[0]["i"].dtype == torch.float64
        assert batch[0]["more"][0].number.dtype == torch.float64
        assert batch[0]["more"][0].square == 2.0


class TestAugmentation:
    """Data that differ when read twice: the loss would be no function of the weights."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda i, j: torch.rand(2),
            lambda i, j: {"x": torch.ones(2), "y": [np.random.rand()]},
            lambda i, j: "".join(np.random.choice(list("abcdefghij"), 8)),
        ],
    )
    def test_it_is_refused(self, make: Callable) -> None:
        message = refusal(Squares(make))
        assert message == (
            "task split 'train': its samples differ when read twice; switch augmentation off"
        )

    def test_values_that_are_equal_nan_are_not_augmentation(self) -> None:
        assert prepare(Squares(lambda i, j: torch.full((2,), torch.nan))).n_samples == 5


class TestDigest:
    def digest(self, *columns: Any, **settings: Any) -> str:
        return prepare(tuple(columns), **settings).sha256

    def test_it_follows_values_dtypes_shapes_and_order(self) -> None:
        base = torch.arange(6.0)
        flipped = base.flip(0)
        other = base.clone()
        other[3] += 2**-22  # the next float
        digests = [
            self.digest(data) for data in (base, flipped, other, base.double(), base[:, None])
        ]
        assert len(set(digests)) == 5
        assert self.digest(base.clone()) == digests[0]
        assert self.digest(base.repeat_interleave(2)[::2]) == digests[0], "strides do not count"

    def test_every_kind_of_number_can_be_hashed(self) -> None:
        kinds = (
            torch.bool,
            torch.uint8,
            torch.int64,
            torch.bfloat16,
            torch.float16,
            torch.complex64,
        )
        assert len({self.digest(torch.ones(3, dtype=kind)) for kind in kinds}) == len(kinds)

    def test_words_count(self) -> None:
        hashes = {prepare([word] * 3).sha256 for word in ("one", "two")}
        assert len(hashes) == 2

    def test_it_is_of_the_data_as_they_came(self) -> None:
        data = (torch.arange(4.0),)
        plain = prepare(data).sha256
        assert prepare(data, place=lambda t: t.double()).sha256 == plain


@dataclass
class PlainRecord:
    x: Tensor
    note: str = "n"


@dataclass(frozen=True)
class FrozenRecord:
    x: Tensor
    note: str = "n"


def to_user_dict(x: Tensor) -> Any:
    return UserDict(x=x, note="n")


def to_encoding(x: Tensor) -> Any:
    return pytest.importorskip("transformers").BatchEncoding({"x": x, "note": "n"})


def to_model_output(x: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=x)


def read_x(batch: Any) -> Tensor:
    if isinstance(batch, PlainRecord | FrozenRecord):
        return batch.x
    return batch["last_hidden_state" if "last_hidden_state" in batch else "x"]


class TestKindsOfBatches:
    @pytest.mark.parametrize(
        "make", [PlainRecord, FrozenRecord, to_user_dict, to_encoding, to_model_output]
    )
    def test_tensors_are_placed_and_count_in_the_hash(self, make: Callable[[Tensor], Any]) -> None:
        made: list[Any] = []

        def collate(rows: list[float]) -> Any:
            made.append(make(torch.tensor(rows)))
            return made[-1]

        found = prepare([0.5, 1.5, 2.5], collate=collate, place=lambda t: t.double())
        (batch,) = found.batches
        assert type(batch) is type(made[-1])
        assert read_x(batch).dtype == torch.float64
        assert read_x(batch).tolist() == [0.5, 1.5, 2.5]
        assert read_x(made[-1]).dtype == torch.float32, "the task's own is left alone"
        again = prepare([0.5, 1.5, 2.5], collate=collate)
        other = prepare([0.5, 1.5, 2.75], collate=collate)
        assert found.sha256 == again.sha256 != other.sha256

    @pytest.mark.parametrize(
        "leaf",
        [
            lambda rows: np.array(rows),
            lambda rows: np.float32(sum(rows)),
            lambda rows: np.array([f"word {row}" * 9 for row in rows], dtype=object),
        ],
    )
    def test_arrays_count_in_the_hash(self, leaf: Callable[[list[float]], Any]) -> None:
        def collate(rows: list[float]) -> Any:
            return {"x": torch.zeros(len(rows)), "array": leaf(rows)}

        hashes = [
            prepare(rows, collate=collate).sha256 for rows in ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0])
        ]
        assert hashes[0] == hashes[1] != hashes[2]
