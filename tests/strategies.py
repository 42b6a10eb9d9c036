"""Small random nets with data, a loss and a path of states, and how the library is run on them.

A `Case` is everything a property needs. Weights are float64 and of order one, movements are a
tenth of them, so that no quantity is small by accident: relative tolerances mean something.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from twin import Interval, Twin

from lcray.allocation.allocator import Accuracy, IntervalLC, Sampling, SplitAllocator
from lcray.allocation.path import Point, Segment
from lcray.allocation.quadrature import get_rule
from lcray.execution.worker.workbench import Workbench
from lcray.planning.make import make_settings
from lcray.tasks.task import Task

State = dict[str, Tensor]
ROUNDING = 1e-12  # of sums in float64, relative to the sum of magnitudes
FEW = settings(deadline=None, derandomize=True, max_examples=20)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
}


class Pair(nn.Module):
    """Two numbers, a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.q = nn.Parameter(torch.zeros(1, dtype=torch.float64))


@dataclass(frozen=True, repr=False)
class Case:
    """A model, a split ``train`` of tensors, a loss per item, and states along a path."""

    name: str
    make: Callable[[], nn.Module]
    data: tuple[Tensor, ...]
    loss: Callable[[Any, Any], Any]
    states: tuple[State, ...]
    groups: Callable[[Any], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    batch_loss: bool = False

    def __repr__(self) -> str:
        return f"<{self.name}, {len(self.data[0])} samples, {len(self.states)} states>"

    @property
    def task(self) -> Task:
        return Task(
            self.make, {"train": self.data}, self.loss, self.groups, batch_loss=self.batch_loss
        )

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


class Bench:
    """A case on the library's side."""

    def __init__(self, case: Case, **options: Any) -> None:
        self.settings = make_settings({"dtype": "float64", **case.options, **options})
        self.work = Workbench(case.task, self.settings)
        self.flat, self.engine = self.work.flat, self.work.engine
        (self.split,) = self.work.splits
        self.layers = self.flat.layers

    def point(self, state: State, step: int = 0) -> Point:
        return Point(step, *self.flat.flatten(state, step))

    def segments(self, states: tuple[State, ...]) -> list[Segment]:
        points = [self.point(state, step) for step, state in enumerate(states)]
        return [Segment(a, b) for a, b in pairwise(points)]

    def allocator(self, first_loss: float | None = None, rule: Any = None) -> SplitAllocator:
        accuracy = Accuracy.of(self.settings, first_loss)
        rule = rule or get_rule(self.settings.rule)
        sampling = Sampling.of(self.settings)
        return SplitAllocator(self.engine, self.split, rule, accuracy, sampling=sampling)

    def run(self, states: tuple[State, ...], **options: Any) -> list[IntervalLC]:
        """All intervals, endpoints shared; what is only valid until the next one is copied."""
        segments = self.segments(states)
        allocator = self.allocator(**options)
        results = []
        for segment, following in zip(segments, [*segments[1:], None], strict=True):
            result = allocator.advance(segment, lambda following=following: following)
            start = result.start_gradient
            results.append(replace(result, start_gradient=None if start is None else start.clone()))
            lc = result.lc
            if lc is not None:
                results[-1] = replace(results[-1], lc=lc.clone())
        return results

    def by_layer(self, vector: Tensor) -> dict[str, Tensor]:
        pairs = zip(self.layers, self.flat.slices, strict=True)
        return {layer.name: vector[where].view(layer.shape) for layer, where in pairs}

    def twin(self, case: Case) -> Twin:
        """The twin on single samples, or on the planned batches where they are part of the loss."""
        mode = self.settings.batch_norm
        n = len(case.data[0])
        chunks: Any = [tuple(part[i : i + 1] for part in case.data) for i in range(n)]
        if mode == "batch" or case.batch_loss:
            chunks = list(self.split.batches)
        return Twin(case.make, case.loss, chunks, case.groups, mode)


def closeness(result: IntervalLC, expected: Interval, bench: Bench) -> float:
    """The largest deviation of an LC from the twin's, in units of Σ|LC|."""
    assert result.lc is not None
    found = bench.by_layer(result.lc)
    assert list(found) == list(expected.lc)
    worst = max(float((found[n] - expected.lc[n]).abs().max()) for n in found)
    return worst / expected.scale


def abs_sum(result: IntervalLC) -> float:
    """Σ|LC|."""
    assert result.lc is not None
    return math.fsum(result.lc.abs().tolist())


def lc_sum(result: IntervalLC) -> float:
    assert result.lc is not None
    return math.fsum(result.lc.tolist())


def gap(result: IntervalLC) -> float:
    return lc_sum(result) - (result.loss_end - result.loss_start)


# --- models ---------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, activation: str, sizes: tuple[int, ...], frozen: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*layers[:-1])
        if frozen:
            self.body[0].weight.requires_grad_(False)
            self.body[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class DictMlp(Mlp):
    """Returns a dict, and holds an integer buffer that matters."""

    def __init__(self, activation: str, sizes: tuple[int, ...]) -> None:
        super().__init__(activation, sizes)
        self.register_buffer("columns", torch.arange(sizes[0]).flip(0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x[:, self.columns])}


class ConvNet(nn.Module):
    """Convolution, BatchNorm in two and one dimensions, transposed convolution, dropout."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn1 = nn.BatchNorm2d(3, eps=1e-3)
        self.up = nn.ConvTranspose2d(3, 2, 2)
        self.act = ACTIVATIONS[activation]()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * 3 * 3, 3)
        self.bn2 = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv(x)))
        h = self.drop(self.act(self.up(h)))
        return self.bn2(self.fc(h.flatten(1)))


class TinyTransformer(nn.Module):
    """One attention head, tied embeddings, a causal mask of -inf and an integer buffer."""

    def __init__(self, vocabulary: int = 6, width: int = 4, length: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        mask = torch.full((length, length), -math.inf).triu(1)
        self.register_buffer("mask", mask)
        self.register_buffer("positions", torch.arange(length))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.place(self.positions)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.mask
        h = h + F.gelu(self.mix(scores.softmax(-1) @ v))
        return self.head(h)


def make_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


# --- losses ---------------------------------------------------------------------------------


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"]


def classify(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(_logits(net(batch[0])), batch[1], reduction="none")


def classify_weighted(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return classify(net, batch), batch[2]


def contrast(net: Any, batch: Any) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, eq. 4): two views of a sample against the others'."""
    left, right = (F.normalize(net(view), dim=1) for view in batch[:2])
    return F.cross_entropy(left @ right.T / 0.5, torch.arange(len(left)), reduction="none")


def labels(batch: Any) -> Tensor:
    return batch[1]


def next_tokens(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """A loss a token; padding (token 0 as target) has weight 0."""
    logits = _logits(net(batch[0]))
    targets = batch[1]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses, (targets.flatten() > 0).to(logits.dtype) * batch[2].flatten()


def token_groups(batch: Any) -> Tensor:
    """Parity of the target; padding has a negative label."""
    targets = batch[1].flatten()
    return torch.where(targets > 0, targets % 2, -1)


# --- cases ----------------------------------------------------------------------------------


def random_states(
    make: Callable[[], nn.Module], seed: int, n: int, step: float = 0.1
) -> tuple[State, ...]:
    """States of order one, a random walk; variances stay positive, frozen parts do not move."""
    torch.manual_seed(seed)  # torch's initialisation of what is kept
    model = make().double()
    random = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def normal(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=random, dtype=torch.float64)

    state: State = {}
    tied: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in tied:
            state[name] = state[tied[id(value)]]
            continue
        tied[id(value)] = name
        if not value.is_floating_point():
            state[name] = value.clone()
        elif name in parameters:
            state[name] = 0.7 * normal(value)
        elif name.endswith("running_var"):
            state[name] = 0.5 + normal(value).abs()
        elif name.endswith("running_mean"):
            state[name] = 0.3 * normal(value)
        else:
            state[name] = value.detach().clone()
    states = [state]
    for _ in range(n - 1):
        new: State = {}
        for name, value in states[-1].items():
            if parameters.get(name) is not None and parameters[name].requires_grad:
                new[name] = value + step * normal(value)
            elif name.endswith("running_var"):
                new[name] = value * torch.exp(step * normal(value))
            elif name.endswith("running_mean"):
                new[name] = value + step * normal(value)
            elif name.endswith("num_batches_tracked"):
                new[name] = value + 1
            else:
                new[name] = value
        for group in _aliases(model):
            for alias in group[1:]:
                new[alias] = new[group[0]]
        states.append(new)
    return tuple(states)


def _aliases(model: nn.Module) -> list[list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(value), []).append(name)
    return [names for names in by_id.values() if len(names) > 1]


def vectors(seed: int, n: int, width: int, classes: int, weighted: bool) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(n, width, generator=random, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=random)
    if not weighted:
        return x, y
    w = torch.rand(n, generator=random, dtype=torch.float64) + 0.1
    w[0] = 0.0
    return x, y, w


def mlp(
    seed: int, activation: str, n: int = 7, weighted: bool = False, states: int = 2, **kwargs: Any
) -> Case:
    def make() -> nn.Module:
        return Mlp(activation, (3, 4, 4, 3), **kwargs)

    return Case(
        f"mlp-{activation}-{seed}",
        make,
        vectors(seed, n, 3, 3, weighted),
        classify_weighted if weighted else classify,
        random_states(make, seed, states),
        labels,
    )


def contrastive(seed: int, activation: str, n: int = 11, size: int = 4, states: int = 2) -> Case:
    """Pairs of views in batches of at most `size`, which are part of the loss; three groups."""

    def make() -> nn.Module:
        return Mlp(activation, (3, 4, 3))

    random = torch.Generator().manual_seed(seed + 4)
    views = torch.randn(2, n, 3, generator=random, dtype=torch.float64)
    return Case(
        f"contrastive-{activation}-{seed}",
        make,
        (views[0], views[0] + 0.3 * views[1], torch.arange(n) % 3),
        contrast,
        random_states(make, seed, states),
        lambda batch: batch[2],
        {"batch_size": size},
        batch_loss=True,
    )


def frozen(seed: int, activation: str, n: int = 6, states: int = 2) -> Case:
    return replace(
        mlp(seed, activation, n, states=states, frozen=True), name=f"frozen-{activation}-{seed}"
    )


def dictionary(seed: int, activation: str, n: int = 6, states: int = 2) -> Case:
    def make() -> nn.Module:
        return DictMlp(activation, (3, 4, 3))

    data = vectors(seed, n, 3, 3, False)
    return Case(
        f"dict-{activation}-{seed}", make, data, classify, random_states(make, seed, states)
    )


def convnet(seed: int, activation: str, mode: str, n: int = 6, states: int = 2) -> Case:
    def make() -> nn.Module:
        return ConvNet(activation)

    random = torch.Generator().manual_seed(seed + 2)
    x = torch.randn(n, 1, 4, 4, generator=random, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=random)
    return Case(
        f"conv-{mode}-{activation}-{seed}",
        make,
        (x, y),
        classify,
        random_states(make, seed, states),
        labels,
        {"batch_norm": mode, "batch_size": 4},
    )


def _tokens(seed: int, n: int, length: int, vocabulary: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed + 3)
    tokens = torch.randint(vocabulary, (n, length), generator=random)
    targets = torch.randint(vocabulary, (n, length), generator=random)
    targets[0, 0], targets[0, 1], targets[0, 2] = 0, 1, 2  # padding and both groups occur
    weights = torch.rand(n, length, generator=random, dtype=torch.float64) + 0.2
    return tokens, targets, weights


def transformer(seed: int, n: int = 4, states: int = 2) -> Case:
    return Case(
        f"transformer-{seed}",
        TinyTransformer,
        _tokens(seed, n, 5, 6),
        next_tokens,
        random_states(TinyTransformer, seed, states),
        token_groups,
    )


def gpt2(seed: int, n: int = 3, states: int = 2) -> Case:
    return Case(
        f"gpt2-{seed}",
        make_gpt2,
        _tokens(seed, n, 4, 7),
        next_tokens,
        random_states(make_gpt2, seed, states),
        token_groups,
    )


seeds = st.integers(0, 10_000)


@st.composite
def cases(draw: Any, *, smooth: bool = False, states: int = 2, heavy: bool = True) -> Case:
    """Any of the small nets."""
    seed = draw(seeds)
    activation = draw(st.sampled_from(["tanh", "gelu"] if smooth else ["tanh", "relu", "gelu"]))
    kinds = ["mlp", "weighted", "frozen", "dict", "running", "batch", "transformer"]
    kind = draw(st.sampled_from([*kinds, "gpt2"] if heavy else kinds))
    n = draw(st.integers(3, 7))
    if kind == "mlp":
        return mlp(seed, activation, n, states=states)
    if kind == "weighted":
        return mlp(seed, activation, n, weighted=True, states=states)
    if kind == "frozen":
        return frozen(seed, activation, n, states=states)
    if kind == "dict":
        return dictionary(seed, activation, n, states=states)
    if kind in ("running", "batch"):
        return convnet(seed, activation, kind, n, states=states)
    return transformer(seed, n, states=states) if kind == "transformer" else gpt2(seed, 3, states)


# --- quadratics -----------------------------------------------------------------------------


class Vector(nn.Module):
    """Seven numbers in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(2, 2))
        self.q = nn.Parameter(torch.zeros(3))

    def forward(self) -> Tensor:
        return torch.cat([self.p.reshape(-1), self.q])


def quadratic_loss(net: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """ℓ = ½ θᵀAθ + bᵀθ for each item."""
    theta = net()
    curvature, slope, weights = batch
    losses = 0.5 * torch.einsum("i,nij,j->n", theta, curvature, theta) + slope @ theta
    return losses, weights


def quadratic(seed: int, n: int = 5, states: int = 2) -> Case:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(n, 7, 7, generator=random, dtype=torch.float64)
    b = torch.randn(n, 7, generator=random, dtype=torch.float64)
    w = torch.rand(n, generator=random, dtype=torch.float64) + 0.1
    return Case(
        f"quadratic-{seed}",
        Vector,
        ((a + a.transpose(1, 2)) / 2, b, w),
        quadratic_loss,
        random_states(Vector, seed, states, step=0.5),
    )
