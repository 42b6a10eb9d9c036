"""Items that depend on their batch, or whose weights depend on the model, are refused; no others.

Then batches that are declared to be part of the loss, against the twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scenes import cross_entropy
from strategies import Bench, Case, closeness, contrastive, seeds
from torch import Tensor, nn

import lcray
from lcray.allocation.path import Point, Segment
from lcray.errors import CheckpointError, OutputError, TaskError, UsageError
from lcray.execution.driver.record import make_fingerprint, make_notes
from lcray.execution.worker.independence import Independence, growing, mixture, two_points
from lcray.execution.worker.tuning import tune
from lcray.execution.worker.workbench import Workbench
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_plan, make_settings
from lcray.tasks.task import Task

# Sums of some hundred float64 terms, relative to Σ|LC|.
CLOSE = 1e-10
N, WIDTH, CLASSES = 60, 5, 3
State = dict[str, Tensor]
Loss = Callable[[Any, Any], Any]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def points(n: int = N) -> tuple[Tensor, Tensor]:
    """Random points; each class is there equally often, in turn."""
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % CLASSES


def two_states(build: Callable[[], nn.Module] = net, step: float = 0.1) -> tuple[State, State]:
    torch.manual_seed(1)
    before = {name: value.clone() for name, value in build().state_dict().items()}
    after = {
        name: value + step * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in before.items()
    }
    return before, after


def between(loss: Loss, build: Any = net, data: Any = None, states: Any = None, **task: Any) -> Any:
    """The allocation between two states."""
    made = Task(build, {"train": data or points()}, loss, **task)
    return lcray.allocate(made, *(states or two_states(build)))["train"]


def refusal(loss: Loss, **given: Any) -> str:
    with pytest.raises(TaskError) as caught:
        between(loss, **given)
    message = str(caught.value)
    assert message.startswith("task loss on split 'train'") and "\n" not in message
    return message


# --- losses of a batch ------------------------------------------------------------------------


def info_nce(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ (z + 0.1).T, torch.arange(len(z)), reduction="none")


def hardest(share: float | int) -> Loss:
    """The loss of the hardest items; a number of them, or a share of the batch."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = cross_entropy(model, batch)
        k = share if isinstance(share, int) else max(1, int(share * len(losses)))
        hard = losses.topk(min(k, len(losses))).indices
        return losses * torch.zeros_like(losses).index_fill(0, hard, 1.0)

    return loss


def hardest_by_weight(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    losses = cross_entropy(model, batch)
    hard = losses.topk(max(1, len(losses) // 2)).indices
    return losses, torch.zeros_like(losses).index_fill(0, hard, 1.0)


def strictly_hardest(model: nn.Module, batch: Any) -> Tensor:
    losses = cross_entropy(model, batch)
    return losses * torch.zeros_like(losses).index_fill(0, losses.topk(16).indices, 1.0)


def own_statistics(model: Any, batch: Any) -> Tensor:
    h = model[0](batch[0])
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt()
    return F.cross_entropy(model[2](h), batch[1], reduction="none")


def kernel_in_training_mode(model: Any, batch: Any) -> Tensor:
    h = torch.batch_norm(model[0](batch[0]), None, None, None, None, True, 0.0, 1e-5, False)
    return F.cross_entropy(model[2](h), batch[1], reduction="none")


def balanced(coefficient: float) -> Loss:
    """With the term that keeps experts busy (Fedus et al. 2021, eq. 4), added to every item."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        busy = F.one_hot(logits.argmax(1), CLASSES).float().mean(0)
        term = CLASSES * (busy * logits.softmax(1).mean(0)).sum()
        return F.cross_entropy(logits, batch[1], reduction="none") + coefficient * term

    return loss


def by_neighbour(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].roll(1), reduction="none")


def alone_in_class(model: nn.Module, batch: Any) -> Tensor:
    """Shows only where a batch holds one class, as batches do that are sorted by class."""
    losses = cross_entropy(model, batch)
    several = bool((batch[1] != batch[1][0]).any())
    return losses if several else 2 * losses


def by_class_size(model: nn.Module, batch: Any) -> Tensor:
    """The same for all batches that hold each class equally often, as the data do."""
    counts = torch.bincount(batch[1], minlength=CLASSES)[batch[1]]
    return cross_entropy(model, batch) * len(counts) / counts / CLASSES


def mean_of_all(model: nn.Module, batch: Any) -> Tensor:
    losses = cross_entropy(model, batch)
    return losses.mean().expand(len(losses))


def weights_at_times(model: nn.Module, batch: Any) -> Any:
    losses = cross_entropy(model, batch)
    return losses if len(losses) > 9 else (losses, torch.full_like(losses, 0.5))


def weights_that_add_up_to_one(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    losses = cross_entropy(model, batch)
    return losses, torch.full_like(losses, 1 / len(losses))


DEPENDENT: dict[str, Loss] = {
    "InfoNCE": info_nce,
    "the hardest 16": hardest(16),
    "the hardest half": hardest(0.5),
    "all but the easiest": hardest(0.99),
    "the hardest half, by weight": hardest_by_weight,
    "statistics by hand": own_statistics,
    "torch.batch_norm": kernel_in_training_mode,
    "balance": balanced(1e-2),
    "weak balance": balanced(1e-3),
    "neighbours": by_neighbour,
    "class sizes": by_class_size,
    "a mean": mean_of_all,
    "weights": weights_that_add_up_to_one,
    "weights at times": weights_at_times,
}


class TestDependent:
    @pytest.mark.parametrize("groups", [None, lambda batch: batch[1]], ids=["plain", "groups"])
    @pytest.mark.parametrize("name", DEPENDENT)
    def test_it_is_refused(self, name: str, groups: Any) -> None:
        message = refusal(DEPENDENT[name], groups=groups)
        assert "items depend on the others of their batch" in message
        assert message.endswith("declare it: Task(batch_loss=True)")

    @pytest.mark.parametrize("name", ["InfoNCE", "the hardest half", "statistics by hand"])
    @pytest.mark.parametrize("n", [2, 3, 4, 7])
    def test_of_a_few_samples(self, name: str, n: int) -> None:
        assert "items depend" in refusal(DEPENDENT[name], data=points(n))

    def test_what_only_sorting_by_class_shows(self) -> None:
        groups = lambda batch: batch[1]  # noqa: E731
        assert "items depend" in refusal(alone_in_class, groups=groups)

    def test_data_that_lie_in_the_order_of_their_classes(self) -> None:
        """Without groups: planned batches follow the data, and hold one class each."""
        x, y = points(600)
        assert "items depend" in refusal(alone_in_class, data=(x, y.sort().values))

    def test_numbers_are_those_of_the_loss(self) -> None:
        """Two samples against one: log 2 is the loss of the pair where all views are the same."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            z = 0 * model(batch[0])
            return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

        message = refusal(loss, data=points(2))
        assert (
            "between 2 samples in one batch and in smaller ones, losses differ by up to 0.693"
            in (message)
        )

    def test_a_number_of_hard_items_that_small_batches_do_not_have(self) -> None:
        message = refusal(strictly_hardest)
        assert "failed: RuntimeError: selected index k out of range" in message
        assert "; it takes a batch of 60 samples, but not of 2 to 21; a loss must take" in message
        assert message.endswith("declare it: Task(batch_loss=True)")

    def test_a_number_of_hard_items_just_below_the_batch(self) -> None:
        """A mixture of 64 samples would have all of them selected."""
        assert "256 samples in one batch" in refusal(hardest(250), data=points(512))

    def test_functional_batch_norm(self) -> None:
        def loss(model: Any, batch: Any) -> Tensor:
            h = F.batch_norm(model[0](batch[0]), None, None, training=True)
            return F.cross_entropy(model[2](h), batch[1], reduction="none")

        with pytest.raises(TaskError, match=r"items depend .*: Task\(batch_loss=True\)$"):
            between(loss)
        assert between(loss, batch_loss=True).loss_change != 0

    def test_padding_that_counts(self) -> None:
        """Items of weight 1 for all places up to the longest sample of a batch."""
        message = refusal(padded_loss(weighted=False), build=embedder, **ragged())
        assert "items have weight (padding must have weight 0)" in message

    def test_a_gate_that_is_shut_at_first(self) -> None:
        """At initialisation nothing shows: the branch that normalises is multiplied by 0."""

        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.gate = nn.Linear(WIDTH, CLASSES), nn.Parameter(torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                h = self.body(x)
                return h + self.gate * (h - h.mean(0))

        before, after = two_states(Gated)
        before["gate"] = torch.zeros(())
        states = before, {**after, "gate": torch.tensor(0.2)}
        assert "items depend" in refusal(cross_entropy, build=Gated, states=states)

    def test_a_loss_that_is_random_is_called_that(self) -> None:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch) * torch.rand(())

        assert "the second time at the same weights" in refusal(loss)

    @pytest.mark.parametrize(
        "options", [{"dtype": "float64"}, {"batch_size": 4}, {"batch_size": 2}, {"samples": 20}]
    )
    def test_whatever_the_settings(self, options: dict[str, Any]) -> None:
        task = Task(net, {"train": points()}, balanced(1e-3))
        with pytest.raises(TaskError, match="items depend"):
            lcray.allocate(task, *two_states(), **options)


# --- losses of items --------------------------------------------------------------------------


def embedder() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))


class Ragged:
    """Sequences of 1 to 6 tokens."""

    def __init__(self, n: int = 40) -> None:
        random = np.random.default_rng(0)
        lengths = 1 + random.permutation(n) % 6
        self._rows = [torch.from_numpy(random.integers(1, 9, size)) for size in lengths]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]


def padded(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def longest_first(rows: list[Tensor]) -> Tensor:
    return padded(sorted(rows, key=len, reverse=True))


def ragged(collate: Any = padded) -> dict[str, Any]:
    return {"data": Ragged(), "collate": collate}


def padded_loss(*, weighted: bool, per_sample: bool = False) -> Loss:
    """Every token predicts itself; padding is token 0."""

    def loss(model: nn.Module, tokens: Tensor) -> Any:
        losses = F.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none")
        there = (tokens > 0).float()
        if per_sample:
            return (losses * there).sum(1) / there.sum(1)
        return (losses.flatten(), there.flatten()) if weighted else losses.flatten()

    return loss


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.5, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.more = nn.MultiheadAttention(6, 3, batch_first=True)
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.body(self.embed(tokens), src_key_padding_mask=tokens == 0)
        h = h + self.more(h, h, h, key_padding_mask=tokens == 0, need_weights=False)[0]
        return self.head(h)


class Images(nn.Module):
    """Convolutions and every normalization, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.Dropout2d(0.5),
            nn.Conv2d(6, 6, 1),
            nn.InstanceNorm2d(6, affine=True),
            nn.GroupNorm(2, 6),
            nn.Flatten(),
            nn.LayerNorm(6 * 9),
            nn.Linear(6 * 9, CLASSES),
            nn.BatchNorm1d(CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(-1, 1, 5, 5))


class Experts(nn.Module):
    """The better of two experts for each item, without any term for the balance."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(1).max(1)
        found = self.experts(x).view(-1, 2, CLASSES)
        return share[:, None] * found[torch.arange(len(x)), chosen]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.LSTM(6, 6), nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens.T))[0])  # time comes first


def by_time(model: nn.Module, batch: Any) -> Tensor:
    """Items of all samples at one time, then at the next."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[0].T.flatten(), reduction="none")


def some_not_finite(model: nn.Module, batch: Any) -> Tensor:
    return torch.where(batch[0][:, 0] > 1, torch.inf, 1.0) * cross_entropy(model, batch)


def in_place(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, (batch[0].mul_(2), batch[1]))


IMAGES = torch.randn(N, 25, generator=torch.Generator().manual_seed(2)), points()[1]
TOKENS = (torch.randint(1, 9, (N, 4), generator=torch.Generator().manual_seed(3)),)
INDEPENDENT: dict[str, dict[str, Any]] = {
    "classes": {"loss": cross_entropy},
    "groups": {"loss": cross_entropy, "groups": lambda batch: batch[1]},
    "one sample": {"loss": cross_entropy, "data": points(1)},
    "two samples": {"loss": cross_entropy, "data": points(2)},
    "normalizations": {"loss": cross_entropy, "build": Images, "data": IMAGES},
    "experts": {"loss": cross_entropy, "build": Experts},
    "attention": {"loss": padded_loss(weighted=True), "build": Attention, **ragged()},
    "a loss per sequence": {
        **ragged(),
        **{"loss": padded_loss(weighted=False, per_sample=True), "build": embedder},
    },
    "sequences that collate sorts": {
        **ragged(longest_first),
        **{"loss": padded_loss(weighted=True), "build": embedder},
    },
    "time first": {"loss": by_time, "build": Recurrent, "data": TOKENS},
    "losses that are not finite": {"loss": some_not_finite},
    "weights of the data": {"loss": lambda m, b: (cross_entropy(m, b), b[0][:, 0].exp())},
    "no weight at all in some batches": {
        "loss": lambda m, b: (cross_entropy(m, b), (b[1] == 2).float()),
        "groups": lambda batch: batch[1],
    },
}


class TestIndependent:
    @pytest.mark.parametrize("name", INDEPENDENT)
    def test_it_is_not_refused(self, name: str) -> None:
        check(**INDEPENDENT[name])
        check(**INDEPENDENT[name], dtype="float64")

    def test_channels_last(self) -> None:
        given: dict[str, Any] = {"build": Images, "data": IMAGES, "memory_format": "channels_last"}
        check(cross_entropy, **given)
        with pytest.raises(TaskError, match="items depend"):
            check(balanced(1e-2), **given)

    def test_batches_of_one_sample_depend_on_nothing(self) -> None:
        check(info_nce, batch_size=1)
        with pytest.raises(TaskError, match="items depend"):
            check(info_nce, batch_size=2, groups=lambda batch: batch[1])

    def test_a_loss_may_write_into_its_batch(self) -> None:
        """Where batches are streamed, each is read anew."""
        check(in_place)

    def test_residuals_that_rounding_rules(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fit to a few units of float32: losses differ by half of their size, in float64 not."""
        build, width = (lambda: nn.Linear(512, 1)), 512
        x = torch.randn(N, width, generator=torch.Generator().manual_seed(4))
        torch.manual_seed(1)
        state = {name: value.clone() for name, value in build().state_dict().items()}
        y = x.double() @ state["weight"].double()[0] + state["bias"].double() + 1e-7

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return (model(batch[0])[:, 0] - batch[1]) ** 2

        given: dict[str, Any] = {"build": build, "data": (x, y), "states": (state, state)}
        check(loss, **given)
        monkeypatch.setattr(Independence, "_in_float64", lambda self, *args: None)
        with pytest.raises(TaskError, match="items depend"):
            check(loss, **given)

    def test_a_model_made_for_float32(self) -> None:
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(WIDTH, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x.to(torch.float32))

        check(cross_entropy, build=Fixed)
        assert "items depend" in refusal(balanced(1e-2), build=Fixed)

    def test_what_it_costs(self) -> None:
        """Two and a half forward passes of a batch: about one forward and backward pass."""
        passed: list[int] = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            passed.append(len(batch[0]))
            return cross_entropy(model, batch)

        for size in (2, 16, 64, 256, 1024):
            for groups in (None, lambda batch: batch[1] % 2):
                passed.clear()
                check(loss, data=points(4096), batch_size=size, groups=groups)
                assert max(passed) <= size
                assert sum(passed) <= 2.5 * size or size < 64


def check(loss: Loss, build: Any = net, data: Any = None, states: Any = None, **given: Any) -> None:
    """The check alone, which raises if it refuses."""
    task = {name: given.pop(name, None) for name in ("groups", "collate")}
    made = Task(build, {"train": data or points()}, loss, **task)
    bench = Workbench(made, make_settings(given))
    found = []
    for step, state in enumerate(states or two_states(build)):
        vector, constants = bench.flat.flatten(state, step)
        found.append(Point(step, vector, constants))
    Independence(bench, made).check(found)


# --- weights that depend on the model ---------------------------------------------------------


class TestWeights:
    def test_a_confidence(self) -> None:
        """Its sum over all items changes as well, but here each item is compared."""

        def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            logits = model(batch[0])
            sure = logits.detach().softmax(1).max(1).values
            return F.cross_entropy(logits, batch[1], reduction="none"), sure

        message = refusal(loss)
        assert message.startswith("task loss on split 'train': an item has weight 0.")
        assert "at step 1; weights must come from the data alone, not from the model" in message

    def test_equal_sums(self) -> None:
        """Half of the items have weight 1 and half 2, and then the other way round."""

        def loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
            odd = (batch[1] + int(model[0].bias[0] > 0)) % 2
            return cross_entropy(model, (batch[0], batch[1])), 1.0 + odd

        before, after = two_states()
        before["0.bias"][0], after["0.bias"][0] = -1.0, 1.0
        data = points()[0], torch.arange(N) % 2
        assert "weights must come from the data" in refusal(loss, data=data, states=(before, after))

    def test_also_where_batches_are_part_of_the_loss(self) -> None:
        message = refusal(hardest_by_weight, batch_loss=True)
        assert "weights must come from the data alone" in message


# --- in an analysis ---------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [two_states(step=0.1 * step)[1] for step in range(4)])


def write_run(folder: Path, states: list[State]) -> Path:
    folder.mkdir()
    for step, state in enumerate(states):
        save_file(state, folder / f"step-{step:08d}.safetensors")
    return folder


def workspace(run: Path, loss: Loss, task: dict[str, Any] | None = None, **options: Any) -> Any:
    made = Task(net, {"train": points(), "val": points(9)}, loss, **task or {})
    return Workspace(made, str(run), make_settings(options))


class TestAnalysis:
    @pytest.mark.parametrize("groups", [None, lambda batch: batch[1] % 2])
    def test_a_batch_that_was_evaluated_is_not_evaluated_again(self, groups: Any) -> None:
        """Its items are compared with those of its samples in pieces."""
        passed: list[int] = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            passed.append(len(batch[0]))
            return cross_entropy(model, batch)

        made = Task(net, {"train": points(600)}, loss, groups)
        bench = Workbench(made, make_settings({"batch_size": 256}))
        states = [bench.flat.flatten(state, step) for step, state in enumerate(two_states(net))]
        first, second = (Point(step, *state) for step, state in enumerate(states))
        Segment(first, first).set_point(bench.flat, 0.0)
        independence = Independence(bench, made)
        (split,) = bench.splits
        assert independence.evaluate(split) == bench.engine.evaluate(split, None)
        passed.clear()
        independence.check([first, second])
        largest = max(split.batch_sizes)
        assert max(passed) < largest < sum(passed)

    def test_a_probe_refuses(self, run: Path) -> None:
        for loss in (info_nce, own_statistics):
            with pytest.raises(TaskError, match=r"split 'train': items depend"):
                workspace(run, loss).probe()

    def test_the_second_split(self, run: Path) -> None:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch)

        task = Task(net, {"train": points(), "val": points(9)}, loss)

        def in_val(model: nn.Module, batch: Any) -> Tensor:
            found = cross_entropy(model, batch)
            return found + 0.1 * found.mean() * bool((batch[0] > 50).any())

        x, y = points(9)
        splits = {"train": points(), "val": (x + 100, y)}
        with pytest.raises(TaskError, match=r"split 'val': items depend"):
            Workspace(
                replace(task, loss=in_val, splits=splits), str(run), make_settings({})
            ).probe()

    def test_a_given_plan_is_no_way_around(self, run: Path) -> None:
        """It may have been made for a task that declared its batches."""
        work = workspace(run, info_nce, {"batch_loss": True}, batch_size=64)
        probe = work.probe()
        plan = make_plan(work.series.steps, work.settings, work.flat.layers, probe.splits)
        assert work.losses(plan) == {s.name: s.first_loss for s in probe.splits}
        with pytest.raises(TaskError, match="items depend"):
            workspace(run, info_nce, batch_size=64).losses(plan)

    def test_the_gradients_and_losses_it_plans_with_are_as_before(self, run: Path) -> None:
        train, _ = workspace(run, cross_entropy).probe().splits
        model = net()
        model.load_state_dict(two_states(step=0.0)[1])
        assert train.first_loss == pytest.approx(
            float(cross_entropy(model, points()).mean().detach())
        )

    @pytest.mark.parametrize(
        ("broken", "expected"), [((), [0, 2]), ((2,), [0, 1]), ((1, 2), [0]), ((3,), [0, 2])]
    )
    def test_the_second_point(self, broken: tuple[int, ...], expected: list[int]) -> None:
        """Not the last, which may still be written, unless there are only two."""

        def read(step: int) -> Point:
            if step in broken:
                raise CheckpointError("torn")
            return Point(step, torch.zeros(2), {})

        assert [point.step for point in two_points((0, 1, 2, 3), read)] == expected

    def test_points_of_two_checkpoints_and_of_one_that_diverged(self) -> None:
        def read(step: int) -> Point:
            return Point(step, torch.full((2,), torch.nan if step == 8 else 1.0), {})

        assert [point.step for point in two_points((0, 5), read)] == [0, 5]
        assert [point.step for point in two_points((0, 8), read)] == [0]
        assert [point.step for point in two_points((0, 3, 5, 8, 9), read)] == [0, 3]


# --- the samples that are compared ------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(n=st.integers(1, 200))
def test_pieces_cover_a_batch_in_order(n: int) -> None:
    order = np.random.default_rng(0).permutation(n)
    pieces = list(growing(order))
    assert np.array_equal(np.concatenate(pieces), order)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) > 1 or n == 1
    assert min(sizes) >= 2 or n < 4
    assert sizes[:2] == [2, 3] or n < 7


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    most=st.integers(1, 64),
    seed=st.integers(0, 99),
)
def test_a_mixture_takes_some_samples_of_some_blocks(
    sizes: list[int], most: int, seed: int
) -> None:
    starts = np.cumsum([0, *sizes])
    blocks = [range(a, a + size) for a, size in zip(starts, sizes, strict=False)]
    pieces = mixture(blocks, most, np.random.default_rng(seed))
    taken = np.concatenate(pieces)
    assert len(set(taken.tolist())) == len(taken) <= most
    for piece in pieces:
        assert len({int(np.searchsorted(starts, i, "right")) for i in piece}) == 1
        assert (np.diff(piece) > 0).all()
    blocks_seen = {int(np.searchsorted(starts, i, "right")) for i in taken}
    assert len(blocks_seen) == min(len(sizes), 6, most if most < 4 else most // 2)
    if len(sizes) == 1:
        assert len(taken) == min(most, sizes[0])


# --- batches that are part of the loss --------------------------------------------------------


class TestDeclared:
    @settings(deadline=None, derandomize=True, max_examples=10)
    @given(
        seed=seeds,
        n=st.integers(3, 11),
        size=st.integers(2, 5),
        rule=st.sampled_from(["simpson", "trapezoid", "gauss"]),
    )
    def test_the_twin_agrees(self, seed: int, n: int, size: int, rule: str) -> None:
        """InfoNCE in the planned batches, groups by the items of each batch."""
        case = contrastive(seed, "tanh", n, size)
        bench = Bench(case, rule=rule)
        assert max(bench.split.batch_sizes) <= size
        assert not bench.split.sorted_by_group
        (found,) = bench.run(case.states)
        expected = bench.twin(case).interval(*case.states, rule)
        assert closeness(found, expected, bench) <= CLOSE
        assert abs(found.loss_start - expected.loss_start) <= CLOSE
        assert found.group_lc is not None
        for row, group in zip(found.group_lc, bench.split.groups, strict=True):
            for value, layer in zip(row.tolist(), bench.layers, strict=True):
                assert abs(value - expected.groups[group][layer.name]) <= CLOSE * max(
                    expected.scale, 1e-3
                )

    @pytest.mark.parametrize(
        "groups",
        [lambda b: b[2], lambda b: b[2] % 2, lambda b: 0 * b[2]],
        ids=["three", "two", "one"],
    )
    def test_groups_change_nothing(self, groups: Any) -> None:
        case = contrastive(7, "gelu", 24, 8)

        def allocation(case: Case) -> Any:
            return lcray.allocate(case.task, *case.states, dtype="float64", **case.options)["train"]

        plain, grouped = (allocation(replace(case, groups=g)) for g in (None, groups))
        assert grouped.loss_change == plain.loss_change
        for name, values in plain.elements.items():
            assert torch.allclose(grouped.elements[name], values, rtol=0, atol=1e-14)

    def test_the_size_of_batches_counts(self) -> None:
        """So it is never tuned: where nothing is said it is 256, also for want of memory."""
        case = contrastive(7, "gelu", 600)
        changes = [
            lcray.allocate(case.task, *case.states, batch_size=size)["train"].loss_change
            for size in (8, 256)
        ]
        assert abs(changes[0] - changes[1]) > 0.01 * abs(changes[0])
        bench = Workbench(case.task, make_settings({}))
        bench.room = 0
        assert bench.fixed_batches and tune(bench).batch_size == 256
        assert tune(Workbench(case.task, make_settings({"batch_size": 31}))).batch_size == 31

    def test_a_loss_that_needs_whole_batches_is_probed_with_them(self) -> None:
        """The hardest 16 of a batch: two samples would not do to find what memory they take."""
        task = Task(net, {"train": points(300)}, strictly_hardest, batch_loss=True)
        found = tune(Workbench(task, make_settings({"batch_size": 32})))
        assert found.batch_size == 32 and found.sample_bytes > 0

    def test_batches_are_a_seeded_permutation(self) -> None:
        case = contrastive(7, "gelu", 24, 8)

        def order(**options: Any) -> list[float]:
            split = Bench(case, **options).split
            return [float(v) for batch in split.batches for v in batch[0][:, 0]]

        assert sorted(order()) == sorted(case.data[0][:, 0].tolist())
        assert order() != case.data[0][:, 0].tolist()
        assert order() == order() != order(batch_seed=1)

    def test_no_sample_of_a_split(self) -> None:
        task = Task(net, {"train": points()}, info_nce, batch_loss=True)
        wanted = (
            r"^samples 10: the task declares that batches are part of the loss "
            r"\(batch_loss=True\), so a single sample has no loss; take all of split 'train'$"
        )
        with pytest.raises(UsageError, match=wanted):
            lcray.allocate(task, *two_states(), samples=10)

    def test_no_fisher_information(self, run: Path) -> None:
        options = {"fisher": 1, "fisher_kind": "empirical"}
        with pytest.raises(TaskError, match=r"^task: declares .*no Fisher information; leave"):
            workspace(run, info_nce, {"batch_loss": True}, **options)

    def test_it_is_on_record(self, run: Path) -> None:
        plain = workspace(run, cross_entropy).describe()
        declared = workspace(run, cross_entropy, {"batch_loss": True}).describe()
        prints = make_fingerprint(plain), make_fingerprint(declared)
        assert "batch_loss" not in prints[0] and prints[1]["batch_loss"] is True
        assert make_notes(plain, make_settings({})) == ()
        (note,) = make_notes(declared, make_settings({}))
        assert note == (
            "batches of up to 256 samples, permuted by seed 0: the task declares that they are "
            "part of the loss (batch_loss=True), so their size decides the numbers and is not "
            "tuned; --batch-size sets it"
        )
        (note,) = make_notes(declared, make_settings({"batch_size": 9, "batch_seed": 3}))
        assert note.startswith("batches of up to 9 samples, permuted by seed 3: the task")


@pytest.mark.usefixtures("inline")
def test_an_analysis_of_batches(run: Path, tmp_path: Path) -> None:
    """With groups or without, in long spans or short ones, the loss changes alike; and verifies."""

    def analyze(name: str, **given: Any) -> Any:
        groups = given.pop("groups", None)
        task = Task(net, {"train": points()}, info_nce, groups=groups, batch_loss=True)
        out = tmp_path / name
        found = lcray.analyze(run, task, out, batch_size=16, dtype="float64", **given)
        assert lcray.verify(out).ok
        return found.intervals()

    plain = analyze("plain", span_length=3)
    grouped = analyze("grouped", span_length=1, groups=lambda batch: batch[1])
    assert len(plain) == 3 and (plain["loss_change"].abs() > 1e-3).all()
    assert (plain["loss_change"] == grouped["loss_change"]).all()
    undeclared = Task(net, {"train": points()}, cross_entropy)
    with pytest.raises(OutputError, match="batch_loss: on there, not set now"):
        lcray.analyze(run, undeclared, tmp_path / "plain", batch_size=16, dtype="float64")


@pytest.mark.usefixtures("inline")
def test_a_plan_says_it(run: Path) -> None:
    task = Task(net, {"train": points()}, info_nce, batch_loss=True)
    report = lcray.plan(run, task)
    assert report.fixed_batches and report.plan.batch_size == 256
    assert any("are part of the loss (batch_loss=True)" in note for note in report.notes)
    assert not lcray.plan(run, replace(task, loss=cross_entropy, batch_loss=False)).fixed_batches


def test_the_answer_without_the_check_would_depend_on_the_batch() -> None:
    """What all of this is for: InfoNCE with another size of batches is another function."""
    states = two_states()
    model = net()
    losses = []
    for state in states:
        model.load_state_dict(state)
        x, y = points()
        by_size = [
            math.fsum(
                float(info_nce(model, (x[i : i + size], y[i : i + size])).sum().detach())
                for i in range(0, N, size)
            )
            / N
            for size in (10, 60)
        ]
        losses.append(by_size)
    changes = [after - before for before, after in zip(*losses, strict=True)]
    assert abs(changes[0] - changes[1]) > 0.05 * abs(changes[0])
