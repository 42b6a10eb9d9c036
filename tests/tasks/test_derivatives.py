"""Models that torch trains otherwise than by the derivative: LC is of the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import Bench, Case, classify, closeness, random_states
from torch import Tensor, nn

from lcray.errors import TaskError
from lcray.tasks.model.derivatives import use_derivatives

# Sums of a few dozen float64 terms in another order, relative to Σ|LC|.
ROUNDING = 1e-13
TOKENS = (torch.tensor([0, 1, 2, 3, 1, 1, 0]), torch.tensor([0, 1, 2, 0, 1, 2, 2]))


class Words(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Embedding, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = kind(5, 3, **options), nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids if isinstance(self.embed, nn.Embedding) else ids[:, None])
        return self.head(torch.tanh(h))


class ByHand(Words):
    """A table of rows, shortened where they are too long: no embedding of torch's."""

    def __init__(self, most: float | None = None, p: float = 2.0, scale: float = 1.0) -> None:
        super().__init__()
        self.most, self.p, self.scale = most, p, scale

    def forward(self, ids: Tensor) -> Tensor:
        table = self.embed.weight
        if self.most is not None:
            norms = (table.abs() ** self.p).sum(1, keepdim=True) ** (1 / self.p)
            table = table * torch.where(norms > self.most, self.most / (norms + 1e-7), 1.0)
        one_hot = (ids[:, None] == torch.arange(5)).double()
        return self.head(torch.tanh(self.scale * (one_hot @ table)))


def case(make: Callable[[], nn.Module], data: tuple[Tensor, ...] = TOKENS) -> Case:
    return Case("words", make, data, classify, random_states(Words, 3, 2))


def check(make: Callable[[], nn.Module], by_hand: Callable[[], nn.Module], **options: Any) -> None:
    bench = Bench(case(make), **options)
    (found,) = bench.run(case(make).states)
    expected = bench.twin(case(by_hand)).interval(*case(make).states, "simpson")
    assert closeness(found, expected, bench) <= ROUNDING
    for state, loss in zip(case(make).states, (found.loss_start, found.loss_end), strict=True):
        fresh = make().double().eval()  # torch's own words for the loss
        fresh.load_state_dict(state)
        assert abs(loss - float(classify(fresh, TOKENS).mean().detach())) <= ROUNDING


@pytest.mark.parametrize("p", [2.0, 1.0])
def test_rows_that_are_too_long(p: float) -> None:
    most = 0.9
    weight = case(Words).states[0]["embed.weight"]
    norms = torch.linalg.vector_norm(weight[:4], p, dim=1)
    assert (norms > most).any() and (norms < most).any()  # both kinds occur
    check(lambda: Words(max_norm=most, norm_type=p), lambda: ByHand(most, p))


@pytest.mark.parametrize("batch_size", [2, 7])
def test_gradients_that_training_divides_by_frequency(batch_size: int) -> None:
    check(lambda: Words(scale_grad_by_freq=True), ByHand, batch_size=batch_size)


def test_the_row_of_padding_has_a_derivative_too() -> None:
    check(lambda: Words(padding_idx=1), ByHand)


def test_the_row_of_padding_of_an_embedding_with_a_forward_pass_of_its_own() -> None:
    check(lambda: Words(Own, padding_idx=1), lambda: ByHand(scale=2.0))


def test_all_at_once_and_sparse() -> None:
    check(lambda: Words(padding_idx=1, max_norm=0.9, sparse=True), lambda: ByHand(0.9))


def test_a_bag_is_not_divided_by_frequency_either() -> None:
    check(lambda: Words(nn.EmbeddingBag, scale_grad_by_freq=True), ByHand)


class Own(nn.Embedding):
    """A forward pass of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


class Tied(Words):
    """The head sees rows shortened or not as the batch has it."""

    def __init__(self) -> None:
        super().__init__(max_norm=0.9)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    "make",
    [
        lambda: Words(nn.EmbeddingBag, max_norm=0.9),
        lambda: Words(Own, max_norm=0.9),
        Tied,
    ],
)
def test_what_still_writes_into_its_weight_is_refused(make: Callable[[], nn.Module]) -> None:
    states = random_states(make, 3, 2)
    with pytest.raises(TaskError, match=r"layer 'embed.weight': was written to while") as caught:
        Bench(Case("writes", make, TOKENS, classify, states)).run(states)
    assert "\n" not in str(caught.value)


def test_what_is_derivative_already_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.EmbeddingBag(3, 2, padding_idx=0))
    use_derivatives(model)
    assert all("forward" not in module.__dict__ for module in model)
    assert model[1].padding_idx == 0  # it leaves the row out of its sums: the derivative is 0


class Hooked(nn.Module):
    """Gradients are clipped, doubled and acted on, as training may want it."""

    def __init__(self, hooks: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        if hooks:
            self.first.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
            self.last.bias.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
            self.last.register_full_backward_hook(lambda m, gin, gout: (2 * gin[0],))
            self.last.register_full_backward_pre_hook(lambda m, gout: (3 * gout[0],))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_hooks_on_gradients_are_of_training() -> None:
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    states = random_states(Hooked, 3, 2)
    plain = Case("plain", lambda: Hooked(hooks=False), (x, TOKENS[1]), classify, states)
    bench = Bench(Case("hooked", Hooked, (x, TOKENS[1]), classify, states))
    (found,) = bench.run(states)
    expected = bench.twin(plain).interval(*states, "simpson")
    assert closeness(found, expected, bench) <= ROUNDING
