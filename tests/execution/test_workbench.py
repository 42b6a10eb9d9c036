"""A task on its device; here the contract of the loss is checked, as users meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lcray
from lcray.allocation.sums import Evaluation
from lcray.errors import TaskError, UsageError
from lcray.execution.worker.workbench import Share, Workbench
from lcray.planning.make import make_settings
from lcray.tasks.model.precision import check_float32, exact_float32
from lcray.tasks.task import Task

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0], [-2.0, 1.0], [1.0, 1.0]])
Y = torch.tensor([0, 1, 0, 1, 1])


class Sum(nn.Module):
    """a · x; the derivative of Σ f over the items is Σ x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a


def per_item(net: nn.Module, batch: Any) -> Tensor:
    return net(batch[0])


def bench(loss: Callable = per_item, task: dict | None = None, **options: Any) -> Workbench:
    known: dict = {"model": Sum, "splits": {"train": (X, Y)}, "loss": loss, **(task or {})}
    return Workbench(Task(**known), make_settings({"batch_size": 3, **options}))


def evaluate(found: Workbench) -> tuple[Evaluation, Tensor]:
    out = found.engine.new_vector()
    return found.engine.evaluate(found.splits[0], out), out


def refusal(loss: Callable, **task: Any) -> str:
    with pytest.raises(TaskError) as caught:
        evaluate(bench(loss, task))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWeightedMean:
    """5 samples in batches of 3 and 2: the mean is over items, not over batches."""

    def test_without_weights(self) -> None:
        found, gradient = evaluate(bench())
        assert found.loss == (8 + 3 + 1 - 1 + 5) / 5
        assert torch.equal(gradient, X.double().sum(0) / 5)
        assert (found.n_items, found.total_weight) == (5, 5.0)

    def test_with_weights(self) -> None:
        weights = torch.tensor([1.0, 0.0, 2.5, 0.0, 0.5])
        data = {"splits": {"train": (X, weights)}}
        found, gradient = evaluate(bench(lambda net, b: (net(b[0]), b[1]), data))
        values = X @ torch.tensor([2.0, 3.0])
        assert found.loss == pytest.approx(float((values * weights).sum() / 4), abs=1e-7)
        torch.testing.assert_close(gradient, (X * weights[:, None]).double().sum(0) / 4)
        assert (found.n_items, found.total_weight) == (5, 4.0)

    @pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
    def test_weights_of_any_kind(self, kind: torch.dtype) -> None:
        keep = torch.tensor([True, False, True, True, False])
        data = {"splits": {"train": (X, keep)}}
        found, gradient = evaluate(bench(lambda net, b: (net(b[0]), b[1].to(kind)), data))
        assert found.total_weight == 3.0
        assert torch.equal(gradient, X[keep].double().sum(0) / 3)

    def test_what_has_no_weight_has_no_say_not_even_nan(self) -> None:
        x = X.clone()
        x[1] = torch.nan
        weights = torch.tensor([1.0, 0, 1, 1, 1])

        def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            values = net(batch[0].nan_to_num())
            return torch.where(batch[0].isnan().any(1), torch.nan, values), batch[1]

        found, gradient = evaluate(bench(loss, {"splits": {"train": (x, weights)}}))
        keep = X[[0, 2, 3, 4]]
        assert found.loss == float((keep @ torch.tensor([2.0, 3.0])).sum() / 4)
        assert torch.equal(gradient, keep.double().sum(0) / 4)

    def test_several_items_a_sample_and_none_for_others(self) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            return net(batch[0].repeat_interleave(2 * batch[1], 0))

        found, gradient = evaluate(bench(loss))
        assert found.n_items == 6
        assert torch.equal(gradient, 2 * X[Y == 1].double().sum(0) / 6)

    def test_a_batch_of_one_item_is_not_taken_for_a_reduced_loss(self) -> None:
        found, _ = evaluate(bench(batch_size=1))
        assert found.n_items == 5


def loss_without_grad(net: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return net(batch[0])


def loss_in_inference_mode(net: nn.Module, batch: Any) -> Tensor:
    with torch.inference_mode():
        return net(batch[0])


class TestLossContract:
    WHERE = "task loss on split 'train', batch 0: "

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda net, b: net(b[0]).mean(), "gave a single number for 3 samples; give one loss"),
            (lambda net, b: net(b[0]).mean()[None], "gave a single number for 3 samples"),
            (lambda net, b: net(b[0])[:, None], "gave shape [3, 1], must be [n]; flatten it"),
            (lambda net, b: net(b[0]).long(), "gave torch.int64, must be a float tensor"),
            (lambda net, b: net(b[0]).detach(), "has no gradient; remove no_grad, detach or"),
            (lambda net, b: b[0].sum(1), "has no gradient"),
            (loss_without_grad, "has no gradient"),
            (loss_in_inference_mode, "has no gradient"),
            (lambda net, b: net(b[0]).tolist(), "must give a tensor [n], gave a list"),
            (lambda net, b: None, "must give a tensor [n], gave nothing (no return?)"),
            (lambda net, b: {"loss": net(b[0])}, "must give a tensor [n], gave a dict"),
            (lambda net, b: (None, b[1]), "must give a tensor [n], gave nothing (no return?)"),
        ],
    )
    def test_losses_of_another_kind(self, loss: Callable, message: str) -> None:
        assert refusal(loss).startswith(self.WHERE + message)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.ones(2), "weights [2] do not match the losses [3]"),
            (torch.ones(3, 1), "weights [3, 1] do not match the losses [3]"),
            ([1, 1, 1], "weights list do not match the losses [3]"),
            (1.0, "weights float do not match"),
        ],
    )
    def test_weights_that_do_not_fit(self, weights: Any, message: str) -> None:
        assert refusal(lambda net, b: (net(b[0]), weights)).startswith(self.WHERE + message)

    def test_weights_with_a_gradient(self) -> None:
        message = refusal(lambda net, b: (net(b[0]), net(b[0]) ** 2))
        assert message == (
            f"{self.WHERE}weights have a gradient, so they depend on the model; weights must come "
            "from the data alone; multiply the losses by factors that depend on the model"
        )

    @pytest.mark.parametrize("weight", [-1e-9, torch.nan, torch.inf])
    def test_weights_that_are_none(self, weight: float) -> None:
        weights = torch.tensor([1, weight, 1, 1, 1])
        message = refusal(lambda net, b: (net(b[0]), b[1]), splits={"train": (X, weights)})
        where = "task loss on split 'train': "
        assert message.startswith(where + "weights must be finite and not negative")

    def test_weights_that_are_all_zero(self) -> None:
        message = refusal(lambda net, b: (net(b[0]), torch.zeros(len(b[0]))))
        assert message == "task loss: the weights of split 'train' add up to 0.0"

    @pytest.mark.parametrize("length", [1, 3])
    def test_tuples_of_another_length(self, length: int) -> None:
        assert refusal(lambda net, b: (net(b[0]),) * length).startswith(self.WHERE)

    def test_a_loss_that_cannot_be_differentiated(self) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            values = net(batch[0]).exp()
            return values.mul_(2) * values

        assert refusal(loss).startswith(self.WHERE)

    def test_a_loss_that_needs_more_arguments(self) -> None:
        def loss(net: nn.Module, batch: Any, extra: int) -> Tensor:
            return net(batch[0])

        message = refusal(loss)
        assert message.startswith(self.WHERE + "failed: TypeError: ")
        assert "missing 1 required positional argument: 'extra'" in message

    def test_a_loss_that_raises_names_the_batch(self) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            if len(batch[0]) == 2:
                raise KeyError("a\nb")
            return net(batch[0])

        line = loss.__code__.co_firstlineno + 2
        expected = f"failed: KeyError: 'a\\nb' (test_workbench.py:{line})"
        assert refusal(loss) == f"task loss on split 'train', batch 1: {expected}"

    def test_an_error_of_several_lines_becomes_one(self) -> None:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            raise ValueError("shapes\n  [2]\n  [3]")

        line = loss.__code__.co_firstlineno + 1
        expected = f"failed: ValueError: shapes [2] [3] (test_workbench.py:{line})"
        assert refusal(loss) == self.WHERE + expected


class TestGroups:
    def test_labels_must_match_the_items(self) -> None:
        message = refusal(per_item, groups=lambda b: b[1].repeat_interleave(2))
        assert "losses but" in message and "group labels; groups must give one label" in message

    def test_negative_labels_need_weight_zero(self) -> None:
        labels = torch.tensor([0, -1, 1, -100, 1])
        data = {"splits": {"train": (X, labels)}, "groups": lambda b: b[1]}
        assert "negative label in split 'train' for an item with weight" in refusal(
            per_item, **data
        )
        found, _ = evaluate(bench(lambda net, b: (net(b[0]), (b[1] >= 0).float()), data))
        assert found.group_weights == (1.0, 2.0)


class TestSetUp:
    def test_floats_take_the_dtype_and_integers_stay(self) -> None:
        found = bench(dtype="float64")
        x, y = found.splits[0].batches[0]
        assert (x.dtype, y.dtype) == (torch.float64, torch.int64)
        assert found.flat.theta.dtype == torch.float64

    def test_splits_come_in_the_tasks_order(self) -> None:
        splits = {name: (X, Y) for name in ("c", "a", "b")}
        names = [split.name for split in bench(task={"splits": splits}).splits]
        assert names == ["c", "a", "b"]
        chosen = bench(task={"splits": splits}, splits=["b", "c"]).splits
        assert [split.name for split in chosen] == ["c", "b"]

    def test_an_unknown_split(self) -> None:
        with pytest.raises(UsageError, match="unknown split 'trin': did you mean 'train'"):
            bench(splits="trin")

    @pytest.mark.parametrize("device", ["cpuu", "cuda:99", ""])
    def test_a_device_that_is_not_there(self, device: str) -> None:
        task = Task(Sum, {"train": (X, Y)}, per_item)
        with pytest.raises(UsageError, match=f"^device {device!r}: cannot be used: ") as caught:
            Workbench(task, make_settings({}), share=Share(device))
        assert "\n" not in str(caught.value)

    def test_threads_are_set_where_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        task = Task(Sum, {"train": (X, Y)}, per_item)
        Workbench(task, make_settings({}))
        assert asked == []
        Workbench(task, make_settings({}), share=Share(threads=3))
        assert asked == [3]

    def test_batches_are_permuted_where_they_are_part_of_the_loss(self) -> None:
        task = {
            "model": lambda: nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)),
            "splits": {"train": TensorDataset(torch.arange(40.0)[:, None])},
            "loss": lambda net, b: F.mse_loss(net(b[0]), b[0], reduction="none").sum(1),
        }

        def order(**options: Any) -> list[float]:
            batches = bench(task=task, batch_size=7, **options).splits[0].batches
            return [float(x) for batch in batches for x in batch[0]]

        assert order() == list(range(40))
        mixed = order(batch_norm="batch")
        assert sorted(mixed) == list(range(40)) and mixed != list(range(40))
        assert mixed == order(batch_norm="batch")
        assert mixed != order(batch_norm="batch", batch_seed=1)


def images(n: int = 6) -> Tensor:
    return torch.arange(float(n * 2 * 3 * 4)).reshape(n, 2, 3, 4)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x).mean((2, 3)) + self.bias).square().sum(1)


def pictures(**options: Any) -> Workbench:
    task = {"model": Convolution, "splits": {"train": (images(), torch.arange(6))}}
    return bench(task=task, **options)


class TestPrecision:
    """Products of float32 are exact to float32, whatever the task's module switches on."""

    @pytest.fixture(autouse=True)
    def _as_before(self) -> Iterator[None]:
        yield
        exact_float32()
        torch.set_autocast_enabled("cpu", False)

    @staticmethod
    def _rounds() -> None:
        torch.set_float32_matmul_precision("medium")
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.mkldnn.conv.fp32_precision = "bf16"
            torch.backends.fp32_precision = "tf32"

    @pytest.mark.parametrize("when", ["before", "model", "splits"])
    def test_what_the_task_switches_on_is_off_again(self, when: str) -> None:
        def model() -> nn.Module:
            if when == "model":
                self._rounds()
            return Sum()

        def splits() -> dict[str, Any]:
            if when == "splits":
                self._rounds()
            return {"train": (X, Y)}

        if when == "before":
            self._rounds()
        found = bench(task={"model": model, "splits": splits})
        evaluate(found)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        if hasattr(torch.backends, "fp32_precision"):
            mkldnn = torch.backends.mkldnn
            kinds = (torch.backends, mkldnn, mkldnn.matmul, mkldnn.conv, torch.backends.cudnn.conv)
            assert {kind.fp32_precision for kind in kinds} == {"ieee"}

    def test_products_that_lose_bits_all_the_same_are_refused(self) -> None:
        """Autocast, left on by the task's module, is no switch of a backend."""

        def model() -> nn.Module:
            torch.set_autocast_dtype("cpu", torch.bfloat16)
            torch.set_autocast_enabled("cpu", True)
            return Sum()

        with pytest.raises(TaskError, match="matrix product of float32 is rounded to fewer bits"):
            bench(task={"model": model})

    @pytest.mark.parametrize("older", [True, False])
    def test_allocate_leaves_the_process_as_it_was(self, older: bool) -> None:
        """It may be called in the middle of a training that wants TF32."""
        newer = hasattr(torch.backends, "fp32_precision")
        if older or not newer:
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        task = Task(model=Sum, splits={"train": (X, Y)}, loss=per_item)
        state = Sum().state_dict()
        lcray.allocate(task, state, {"a": state["a"] + 1})
        if older or not newer:
            assert torch.get_float32_matmul_precision() == "high"
            assert torch.backends.cuda.matmul.allow_tf32
        else:
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"

    def test_products_are_judged_by_a_number_that_few_bits_cannot_hold(self) -> None:
        check_float32(torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TaskError, match="autocast"):
            check_float32(torch.device("cpu"))


class TestAdopting:
    def test_batches_of_another_size(self) -> None:
        found = bench(batch_size=None)
        assert found.batch_size == 256
        assert found.splits[0].batch_sizes == (5,)
        hashes = dict(found.hashes)
        found.adopt(2, "contiguous")
        assert found.splits[0].batch_sizes == (2, 2, 1)
        assert torch.equal(torch.cat([batch[0] for batch in found.splits[0].batches]), X)
        assert found.hashes == hashes == {"train": found.splits[0].sha256}

    def test_nothing_changes_where_nothing_differs(self) -> None:
        found = bench()
        before = found.splits
        found.adopt(3, "contiguous")
        assert found.splits is before

    def test_data_are_opened_again_where_they_were_let_go(self) -> None:
        opened: list[int] = []

        def splits() -> dict[str, Any]:
            opened.append(1)
            return {"train": (X, Y)}

        found = bench(task={"splits": splits})
        found.adopt(3, "contiguous")
        assert found.splits[0].batches.resident and found._sources is None
        found.adopt(2, "contiguous")
        assert found.splits[0].batch_sizes == (2, 2, 1)
        assert len(opened) == 2
        streaming = Workbench(
            Task(Sum, splits, per_item), make_settings({"batch_size": 3}), share=Share(memory=1)
        )
        streaming.adopt(3, "contiguous")
        assert not streaming.splits[0].batches.resident and streaming._sources is not None

    def test_images_and_weights_with_the_channels_innermost(self) -> None:
        found = pictures(batch_size=6, dtype="float64")
        plain, gradient = evaluate(found)
        found.adopt(6, "channels_last")
        (x, numbers), weight = found.splits[0].batches[0], found.flat.model.conv.weight
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert torch.equal(x, images().double()) and torch.equal(numbers, torch.arange(6))
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        moved, permuted = evaluate(found)
        assert moved.loss == pytest.approx(plain.loss, rel=1e-12)
        found.adopt(6, "contiguous")
        again, back = evaluate(found)
        assert again.loss == plain.loss and torch.equal(back, gradient)
        torch.testing.assert_close(permuted.sort().values, gradient.sort().values)

    def test_a_format_that_was_asked_for_is_there_from_the_start(self) -> None:
        found = pictures(memory_format="channels_last")
        assert found.memory_format == found.flat.layout.memory_format == "channels_last"
        assert not found.splits[0].batches[0][0].is_contiguous()
        assert pictures().memory_format == "contiguous"

    def test_volumes_too(self) -> None:
        found = pictures(memory_format="channels_last")
        volume = found._place(torch.zeros(2, 3, 4, 5, 6))
        assert volume.is_contiguous(memory_format=torch.channels_last_3d)
        assert found._place(torch.zeros(2, 3, 4)).is_contiguous()


class TestMemory:
    """X takes 40 bytes and Y as many; half of the room is for data, in the order of the splits."""

    def resident(self, room: int) -> list[bool]:
        splits = {name: (X, Y) for name in ("a", "b", "c")}
        found = bench(task={"splits": splits})
        found.room = room
        return [split.batches.resident for split in found.splits]

    @pytest.mark.parametrize(("room", "count"), [(0, 0), (158, 0), (160, 1), (320, 2), (480, 3)])
    def test_what_fits_stays(self, room: int, count: int) -> None:
        assert self.resident(room) == [True] * count + [False] * (3 - count)

    def test_streamed_batches_are_the_resident_ones(self) -> None:
        resident, streamed = bench(), bench()
        streamed.room = 0
        assert not streamed.splits[0].batches.resident
        (a, ga), (b, gb) = evaluate(resident), evaluate(streamed)
        assert a == b and torch.equal(ga, gb)

    def test_room_is_what_is_left_of_what_was_asked_for(self) -> None:
        task = Task(Sum, {"train": (X, Y), "val": (X, Y)}, per_item)
        settings = make_settings({})
        asked = 2**40
        found = Workbench(task, settings, share=Share(memory=asked))
        # 2 elements, in two splits.
        assert found.room == asked - found.base_bytes - 2 * (63 + 27)
        assert found.base_bytes > 50 * 2**20, "torch alone takes more"
        assert Workbench(task, settings, share=Share(memory=2**20)).room == 0

    def test_by_default_it_is_a_share_of_what_is_free(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "lcray.execution.worker.workbench.available_bytes", lambda device: 10**9
        )
        task = Task(Sum, {"train": (X, Y)}, per_item)
        assert Workbench(task, make_settings({})).room == 800_000_000 - 2 * 63
        shared = Workbench(task, make_settings({"dtype": "float64"}), share=Share(sharers=4))
        assert shared.room == 200_000_000 - 2 * 2 * 63


class TestExcerpts:
    LABELS = torch.tensor([0, 1, 1, 0, 1, 1, 1])

    def grouped(self) -> Workbench:
        splits = {"train": (torch.arange(14.0).reshape(7, 2), self.LABELS)}
        return bench(task={"splits": splits, "groups": lambda batch: batch[1]})

    def test_the_largest_batches_as_they_are_cut(self) -> None:
        found = self.grouped().excerpt(0, 4, 2)  # of 2 and of 3 and 2 samples
        assert found.batch_sizes == (3, 2) and found.n_samples == 5
        assert torch.equal(found.batches[0][1], torch.ones(3, dtype=torch.long))
        assert (found.labels, found.groups) == ((), ())
        whole = self.grouped().excerpt(0, 100, 9)
        assert whole.batch_sizes == (5, 2)

    def test_only_what_is_needed_is_read(self) -> None:
        read: list[int] = []

        class Slow(TensorDataset):
            def __getitem__(self, index: int) -> Any:
                read.append(index)
                return super().__getitem__(index)

        splits = {"train": Slow(torch.zeros(100, 2), torch.arange(100) % 3)}
        # Labels that mix within batches: with groups, every batch would have to be read.
        task = {"splits": splits, "groups": lambda batch: batch[1].repeat(2)[: len(batch[1])]}
        found = bench(task=task, batch_norm="batch")
        read.clear()
        found.excerpt(0, 5, 2)
        assert len(read) <= 15


def test_batch_statistics_outlive_a_first_evaluation_that_fails() -> None:
    """As when a probe tries a batch that the loss does not take."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64)

    def loss(net: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return net(batch[0].view(-1, 4, 3).flatten(0, 1)).square().sum(1)

    task = Task(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), {"train": (x,)}, loss)
    settings = make_settings({"dtype": "float64", "batch_norm": "batch", "batch_size": 8})
    torch.manual_seed(1)
    fresh = Workbench(task, settings)
    torch.manual_seed(1)
    tried = Workbench(task, settings)
    with pytest.raises(TaskError):
        tried.engine.evaluate(tried.excerpt(0, 2), None)
    expected = fresh.engine.evaluate(fresh.splits[0], None).loss
    assert tried.engine.evaluate(tried.splits[0], None).loss == expected
    # Statistics of the batch: the mean of the squares of every feature is 1, but for eps.
    assert expected == pytest.approx(4.0, abs=1e-2)
