"""Closed forms against `torch.func` per-sample gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray.allocation.fisher import ghost, norms
from lcray.allocation.fisher.ghost import Watch
from lcray.allocation.fisher.norms import Outer, square


class Conv(nn.Module):
    """Tanh of a convolution, summed with fixed weights: every output pixel counts otherwise."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(x)).flatten(1)
        return y @ torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)


class Tied(nn.Module):
    """Embedding and head are one tensor, a layer is applied twice, and there is a LayerNorm."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, padding_idx=padding)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        logits = self.head(torch.tanh(self.mix(self.mix(hidden))))
        return -logits.log_softmax(-1)[..., 2].square().sum(-1)


def stack(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.Flatten())


def shake(model: nn.Module) -> nn.Module:
    """Everything off its initial value, running statistics and all."""
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data += 0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model.eval()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (5, 6)),
    "linear on sequences": (lambda: stack(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (5, 7, 6)),
    "linear on few positions": (lambda: stack(nn.Linear(40, 30), nn.Tanh()), (5, 3, 40)),
    "linear on images": (lambda: stack(nn.Linear(6, 4), nn.Tanh()), (5, 3, 2, 6)),
    "stride": (lambda: Conv(nn.Conv2d(3, 4, 3, stride=2)), (5, 3, 8, 9)),
    "uneven stride": (lambda: Conv(nn.Conv2d(3, 4, (3, 2), stride=(2, 3))), (5, 3, 9, 9)),
    "padding": (lambda: Conv(nn.Conv2d(3, 4, 3, padding=(2, 1))), (5, 3, 6, 5)),
    "same": (lambda: Conv(nn.Conv2d(3, 4, (2, 4), padding="same")), (5, 3, 6, 5)),
    "circular": (
        lambda: Conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        (5, 3, 6, 5),
    ),
    "dilation": (lambda: Conv(nn.Conv2d(3, 4, 3, dilation=2, padding=1)), (5, 3, 8, 8)),
    "groups": (lambda: Conv(nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1)), (5, 4, 7, 7)),
    "depthwise": (lambda: Conv(nn.Conv2d(4, 4, 3, groups=4, bias=False)), (5, 4, 5, 5)),
    "many channels": (lambda: Conv(nn.Conv2d(20, 30, 3)), (5, 20, 4, 4)),  # the Gram form
    "conv1d": (lambda: Conv(nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2)), (5, 3, 11)),
    "batch norm": (
        lambda: stack(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        (5, 3, 5, 5),
    ),
    "group norm": (lambda: stack(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()), (5, 3, 5, 5)),
    "norm of vectors": (lambda: stack(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh()), (5, 6)),
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Of each sample, [B]."""
    y = model(x)
    return y if y.dim() == 1 else (y.flatten(1).sin() + y.flatten(1).square()).sum(1)


def by_functional(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """|G|² of each sample by vmap of grad."""

    def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        rows = torch.func.functional_call(model, parameters, (sample[None],))
        return loss(lambda _: rows, sample)[0]  # type: ignore[arg-type]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, x)
    return {name: g.square().flatten(1).sum(1) for name, g in found.items()}


def by_watching(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    names = [name for name, _ in model.named_parameters()]
    watch = Watch({id(p): n for n, p in enumerate(model.parameters())}, len(x))
    with watch:
        total = loss(model, x).sum()
    gradients = torch.autograd.grad(total, watch.edges, allow_unused=True)
    return {name: watch.squares(n, gradients) for n, name in enumerate(names)}


def compare(model: nn.Module, x: Tensor) -> None:
    expected, found = by_functional(model, x), by_watching(model, x)
    assert found.keys() == expected.keys() and found
    for name, values in found.items():
        assert values is not None, name
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected[name], rtol=1e-10, atol=0)


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETS)
def test_closed_forms(name: str) -> None:
    make, shape = NETS[name]
    compare(shake(make()), torch.randn(shape))


@pytest.mark.parametrize("padding", [None, 2, -1])
def test_tied_weights_and_repeated_layers(padding: int | None) -> None:
    compare(shake(Tied(padding)), torch.randint(7, (5, 4)))


def test_samples_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost, "ROOM", 3000)
    seen: list[int] = []
    monkeypatch.setattr(ghost, "square", lambda parts: [seen.append(1), norms.square(parts)][1])
    compare(shake(Conv(nn.Conv2d(3, 4, 3))), torch.randn(5, 3, 6, 6))
    assert len(seen) > 4, "the weight in several parts, and the bias"


def test_both_ways_to_square_agree() -> None:
    left, right = torch.randn(4, 2, 6, 5), torch.randn(4, 2, 6, 3)
    ids = torch.randint(5, (4, 2, 6))
    parts = [Outer(left, right, (2, 5, 3)), Outer(ids, right.flip(2), (2, 5, 3))]
    direct = square(parts)
    torch.testing.assert_close(norms._gram(parts), direct, rtol=1e-12, atol=0)
    # By loops, from the definition.
    for b in range(4):
        total = torch.zeros(2, 5, 3)
        for g in range(2):
            for k in range(6):
                total[g] += torch.outer(left[b, g, k], right[b, g, k])
                total[g, ids[b, g, k]] += right.flip(2)[b, g, k]
        assert direct is not None
        assert float(direct[b]) == pytest.approx(float(total.square().sum()), rel=1e-12)


class Written(nn.Module):
    """Writes into the input of its layer, after the layer has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 2
        y = self.layer(hidden)
        hidden.detach().add_(1.0)
        return y


def test_no_closed_form_from_what_was_written_over() -> None:
    x = torch.randn(5, 4)
    model = Written()
    watch = Watch({id(p): n for n, p in enumerate(model.parameters())}, 5)
    with watch:
        total = model(x).sum()
    gradients = (torch.ones(5, 3),)
    assert watch.squares(0, gradients) is None and total.isfinite()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda w: F.linear(torch.randn(7, 3), w), (4, 3)),  # 7 rows of 5 samples
        (lambda w: F.conv2d(torch.randn(3, 6, 6), w), (4, 3, 2, 2)),  # no batch at all
        (lambda w: F.embedding(torch.tensor([0, 1]), w), (4, 3)),
        (lambda w: F.embedding(torch.arange(5) % 4, w, max_norm=1.0), (4, 3)),
        (lambda w: F.embedding(torch.arange(5) % 4, w, scale_grad_by_freq=True), (4, 3)),
    ],
)
def test_no_closed_form_without_samples(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    weight = nn.Parameter(torch.randn(shape))
    watch = Watch({id(weight): 0}, 5)
    with watch:
        total = function(weight).sum()
    gradients = torch.autograd.grad(total, watch.edges, allow_unused=True)
    assert watch.squares(0, gradients) is None
