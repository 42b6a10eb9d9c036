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

from lcray.errors import TaskError
from lcray.tasks.data.pytree import Digest
from lcray.tasks.data.split import SplitData, SplitSource, open_split
from lcray.tasks.task import Task


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
    return open_split(name, data, task, fixed_seed=fixed_seed).cut(batch_size, place=place)


def source_of(
    data: Any,
    *,
    groups: Callable | None = None,
    collate: Callable | None = None,
    fixed_seed: int | None = None,
    **settings: Any,
) -> SplitSource:
    task = Task(lambda: nn.Linear(1, 1), {"train": data}, lambda net, b: b, groups, collate)
    return open_split("train", data, task, fixed_seed=fixed_seed, **settings)


def same(tensor: Tensor) -> Tensor:
    return tensor


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
        ends_alike = (torch.arange(4), torch.tensor([0, 1, 2, 0]))
        assert not source_of(ends_alike, groups=lambda b: b[1].flip(0)).sorted_by_group

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
        monkeypatch.setattr("lcray.tasks.data.groups.MAX_GROUPS", 5)
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
            "task split 'train': samples 0…4 cannot be made into a batch: RuntimeError: "
        )

    def test_a_data_set_that_raises(self) -> None:
        def make(i: int, j: int) -> int:
            if i == 4:
                raise OSError("disk\ngone")
            return i

        assert refusal(Squares(make)).startswith(
            "task split 'train': sample 4 cannot be read: OSError: disk gone (test_split.py:"
        )

    def test_every_tensor_is_placed_and_nothing_else(self) -> None:
        data = Squares(lambda i, j: {"i": torch.tensor(i), "more": [Pair(torch.ones(1), 2.0)]})
        seen = []

        def place(tensor: Tensor) -> Tensor:
            seen.append(tensor)
            return tensor.double()

        batch = prepare(data, batch_size=5, place=place, collate=lambda rows: rows).batches[0]
        assert len([tensor for tensor in seen if tensor.numel()]) == 2 * 5
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

    @pytest.mark.parametrize("kind", [tuple, lambda columns: list(zip(*columns, strict=True))])
    def test_cutting_and_sorting_play_no_part(self, kind: Callable) -> None:
        data = kind([torch.arange(40.0), torch.arange(40) % 3])
        settings: list[dict[str, Any]] = [
            {"batch_size": 1},
            {"batch_size": 40},
            {"fixed_seed": 3},
            {"groups": lambda b: b[1]},
        ]
        plain = prepare(data).sha256
        assert {prepare(data, **options).sha256 for options in settings} == {plain}
        for chunk in (1, 7, 39, 1000):
            assert source_of(data, chunk=chunk).sha256 == plain


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


class Ragged(Dataset):
    """Sample i holds i % 4 + 1 words."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        if index >= 11:
            raise IndexError(index)
        return {"words": torch.arange(index % 4 + 1) + index, "label": index % 2}


def padded(rows: list[Any]) -> Any:
    words = nn.utils.rnn.pad_sequence([row["words"] for row in rows], True, -1)
    return {"words": words, "label": torch.tensor([row["label"] for row in rows])}


def by_word(batch: Any) -> Tensor:
    return torch.where(batch["words"] < 0, -100, batch["words"] % 3).flatten()


def columns() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, 3, generator=generator), torch.arange(11) * 7 % 3


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tensors": (columns, {}),
    "sorted": (columns, {"groups": lambda b: b[1]}),
    "sorted, two items": (columns, {"groups": lambda b: b[1].repeat_interleave(2)}),
    "unsorted": (columns, {"groups": lambda b: torch.stack([b[1], b[1] + 1], 1).flatten()}),
    "permuted": (columns, {"fixed_seed": 5}),
    "permuted with groups": (columns, {"fixed_seed": 5, "groups": lambda b: b[1]}),
    "data set of tensors": (lambda: TensorDataset(*columns()), {"groups": lambda b: b[1]}),
    "dictionaries and words": (
        lambda: [{"x": x, "y": y, "word": f"w{y}"} for x, y in zip(*columns(), strict=True)],
        {"groups": lambda b: b["y"]},
    ),
    "collated by the task": (
        lambda: list(range(11)),
        {"collate": lambda rows: Pair(torch.tensor(rows), torch.tensor(rows) ** 2.0)},
    ),
    "ragged": (Ragged, {"collate": padded}),
    "ragged, sorted": (Ragged, {"collate": padded, "groups": lambda b: b["label"]}),
    "ragged, words": (Ragged, {"collate": padded, "groups": by_word}),
    "ragged, permuted": (Ragged, {"collate": padded, "groups": by_word, "fixed_seed": 1}),
}


def content(found: SplitData) -> tuple[Any, ...]:
    """Everything but where the batches are, in a form that compares exactly."""
    sums = []
    for batch in found.batches:
        digest = Digest()
        digest.add(batch)
        sums.append((digest.hexdigest(), type(batch)))
    return (
        sums,
        found.batch_sizes,
        [label.tolist() for label in found.labels],
        [number.tolist() for number in found.numbers],
        found.present,
        (found.name, found.n_samples, found.groups, found.sorted_by_group, found.sha256),
    )


@pytest.mark.parametrize("case", CASES)
class TestPlaces:
    """Where batches are, and how often a split was cut before, changes nothing."""

    def source(self, case: str) -> SplitSource:
        make, settings = CASES[case]
        return source_of(make(), **settings)

    def test_resident_and_streamed_are_the_same(self, case: str) -> None:
        source = self.source(case)
        for place in (same, lambda t: t.double() if t.is_floating_point() else t):
            resident = source.cut(4, place=place)
            streamed = source.cut(4, place=place, resident_bytes=0)
            assert resident.batches.resident and not streamed.batches.resident
            assert content(resident) == content(streamed)
            assert content(streamed) == content(streamed), "twice"

    def test_cut_again_is_a_fresh_cut(self, case: str) -> None:
        source = self.source(case)
        source.cut(4, place=same)
        source.cut(2, place=same, resident_bytes=0)
        for size in (3, 11, 1, 4):
            again = source.cut(size, place=same)
            assert content(again) == content(self.source(case).cut(size, place=same))
            assert max(again.batch_sizes) <= size

    def test_numbers_are_the_places_of_the_labels(self, case: str) -> None:
        found = self.source(case).cut(4, place=same)
        if not found.labels:
            assert (found.numbers, found.present) == ((), ())
        for labels, numbers, present in zip(
            found.labels, found.numbers, found.present, strict=True
        ):
            known = [*found.groups, None]
            assert [known[k] for k in numbers.tolist()] == [
                label if label >= 0 else None for label in labels.tolist()
            ]
            assert list(present) == sorted(set(numbers.tolist()))

    def test_labels_are_those_of_the_batches(self, case: str) -> None:
        groups = CASES[case][1].get("groups")
        found = self.source(case).cut(4, place=same)
        if groups is not None:
            assert [label.tolist() for label in found.labels] == [
                groups(batch).tolist() for batch in found.batches
            ]


@pytest.mark.parametrize("case", CASES)
def test_an_excerpt_is_the_largest_batches_of_a_cut(case: str) -> None:
    make, settings = CASES[case]
    source = source_of(make(), **settings)
    whole = source.cut(4, place=same)
    for count in (1, 2, 100):
        found = source.excerpt(4, count, place=same)
        sizes = whole.batch_sizes
        chosen = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[:count]
        assert found.batch_sizes == tuple(sizes[i] for i in chosen)
        assert found.n_samples == sum(found.batch_sizes) and found.batches.resident
        for i, batch in zip(chosen, found.batches, strict=True):
            one, other = Digest(), Digest()
            one.add(batch)
            other.add(whole.batches[i])
            assert one.hexdigest() == other.hexdigest()
        assert (found.groups, found.labels, found.numbers, found.present) == ((), (), (), ())


class Counting(Squares):
    """Counts how often each sample is read."""

    def __init__(self, n: int) -> None:
        super().__init__(lambda i, j: (torch.tensor(i), torch.tensor(i % 3)), n)
        self.reads = [0] * n

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return super().__getitem__(index)


class TestReading:
    """A data set that decodes pictures is slow: how often is each sample read?"""

    def test_once_when_opened_but_for_the_first_and_last(self) -> None:
        for groups in (None, lambda b: b[1], lambda b: b[1].repeat_interleave(2)):
            data = Counting(100)
            source_of(data, groups=groups, chunk=20)
            assert set(data.reads[20:-1]) == {1}

    def test_once_when_cut_and_once_an_evaluation_when_streamed(self) -> None:
        data = Counting(100)
        source = source_of(data, groups=lambda b: b[1], chunk=20)
        data.reads = [0] * 100
        found = source.cut(7, place=same)
        list(found.batches), list(found.batches)
        assert set(data.reads) == {1}
        data.reads = [0] * 100
        assert sum(source.excerpt(7, 2, place=same).batch_sizes) == sum(data.reads)
        data.reads = [0] * 100
        found = source.cut(7, place=same, resident_bytes=0)
        assert sum(data.reads) == found.batch_sizes[0], "the first batch shows the size"
        list(found.batches), list(found.batches)
        assert sum(data.reads) == found.batch_sizes[0] + 2 * 100

    def test_large_samples_are_read_few_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = []

        def collate(rows: list[Tensor]) -> Tensor:
            sizes.append(len(rows))
            return torch.stack(rows)

        data = [torch.ones(1000) for _ in range(60)]
        monkeypatch.setattr("lcray.tasks.data.samples._HELD", 20 * 4000)
        found = source_of(data, collate=collate, groups=lambda b: b[:, 0].long())
        assert max(sizes) == 20 and found.sorted_by_group


class TestFitting:
    DATA = (torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))  # 12 + 8 bytes a sample

    @pytest.mark.parametrize(
        ("place", "size"), [(same, 200), (lambda t: t.double(), 320), (lambda t: t.half(), 80)]
    )
    def test_the_size_of_tensors_is_exact(self, place: Callable, size: int) -> None:
        source = source_of(self.DATA)
        for most, resident in ((None, True), (size, True), (size - 1, False), (0, False)):
            batches = source.cut(4, place=place, resident_bytes=most).batches
            assert (batches.resident, batches.nbytes, len(batches)) == (resident, size, 3)

    def test_later_batches_that_are_larger_count(self) -> None:
        # Batches of 2 samples: 2 × 1 float, then 2 × 9 floats; a guess from the first is 16.
        data = [torch.ones(length) for length in (1, 1, 9, 9)]
        pad = source_of(data, collate=lambda rows: nn.utils.rnn.pad_sequence(rows, True))
        assert pad.cut(2, place=same).batches.nbytes == 80
        assert pad.cut(2, place=same, resident_bytes=80).batches.resident
        assert not pad.cut(2, place=same, resident_bytes=79).batches.resident
        assert not pad.cut(2, place=same, resident_bytes=15).batches.resident


class TestCopies:
    """A loss may write into its batches: never into the user's data."""

    @pytest.mark.parametrize(
        "settings",
        [{}, {"fixed_seed": 1}, {"groups": lambda b: b[1]}, {"place": lambda t: t.double()}],
    )
    def test_every_batch_has_memory_of_its_own(self, settings: dict[str, Any]) -> None:
        x, y = torch.randn(10, 3), torch.arange(10) % 2
        found = prepare((x, y), **settings)
        storages = {batch[0].untyped_storage().data_ptr() for batch in found.batches}
        assert len(storages) == len(found.batches)
        assert x.untyped_storage().data_ptr() not in storages
        for batch in found.batches:
            assert batch[0].is_contiguous()
            size = batch[0].numel() * batch[0].element_size()
            assert batch[0].untyped_storage().nbytes() == size

    def test_a_file_mapped_into_memory(self, tmp_path: Any) -> None:
        np.save(tmp_path / "x.npy", np.arange(12.0).reshape(6, 2))
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
        found = prepare((x,), batch_size=4)
        found.batches[1][0].zero_()  # a view of what is mapped read-only would end the process
        assert found.sha256 == prepare((torch.arange(12.0).double().view(6, 2),)).sha256


class TestFailingLater:
    """Samples that can be read when the split is opened, and not any more."""

    def test_a_stream_names_split_and_batch(self) -> None:
        broken = []

        def make(i: int, j: int) -> int:
            if i in broken:
                raise OSError("disk\ngone")
            return i

        source = source_of(Squares(make, 9))
        found = source.cut(3, place=same, resident_bytes=0)
        broken.append(7)
        seen = []
        with pytest.raises(TaskError) as caught:
            for batch in found.batches:
                seen.append(batch.tolist())
        assert seen == [[0, 1, 2], [3, 4, 5]]
        shown = "task split 'train', batch 2: sample 7 cannot be read: OSError: disk gone"
        assert str(caught.value).startswith(shown)
        with pytest.raises(TaskError, match="'train', batch 2: sample 7 cannot"):
            source.cut(3, place=same)

    def test_labels_that_only_some_batches_have(self) -> None:
        # Padding has group 9: chunks of one length have none, batches across them do.
        data = [torch.zeros(2, dtype=torch.int64)] * 2 + [torch.zeros(1, dtype=torch.int64)] * 2
        source = source_of(
            data,
            collate=lambda rows: nn.utils.rnn.pad_sequence(rows, True, 9),
            groups=lambda b: b.flatten(),
            chunk=2,
        )
        found = source.cut(3, place=same)
        assert found.groups == tuple(torch.cat(found.labels).unique().tolist())
        assert source.cut(4, place=same).groups == (0, 9)
        assert source.cut(4, place=same).present == ((0, 1),)
