"""BatchNorm and InstanceNorm in the two modes, against torch's own kernels and their formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenes import cross_entropy
from strategies import Bench, Case, classify, closeness, convnet, random_states
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twin import Twin

from lcray.errors import TaskError
from lcray.execution.in_memory import allocate
from lcray.execution.worker.workbench import Workbench
from lcray.settings import Settings
from lcray.tasks.model.batch_norm import Normalization, depends_on_batches, may_normalize
from lcray.tasks.task import Task

# The formula and torch's kernel round differently: a few units of 2^-53 of numbers of order ten.
ROUNDING = 1e-13
LAYERS = {
    "1d": (lambda **k: nn.BatchNorm1d(3, **k), (6, 3)),
    "1d-sequence": (lambda **k: nn.BatchNorm1d(3, **k), (6, 3, 4)),
    "2d": (lambda **k: nn.BatchNorm2d(3, **k), (5, 3, 2, 4)),
    "3d": (lambda **k: nn.BatchNorm3d(3, **k), (4, 3, 2, 2, 2)),
}


def layer_and_input(name: str, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    random = torch.Generator().manual_seed(3)
    layer = make(eps=1e-2, **kwargs).double()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=random, dtype=torch.float64) + 0.5)
    return layer, 3 * torch.randn(shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_running_is_torch_in_evaluation_mode(name: str, affine: bool) -> None:
    layer, x = layer_and_input(name, affine=affine)
    expected = layer.eval()(x)
    before = copy.deepcopy(layer.state_dict())
    with Normalization("running", fixed_batches=True):
        found = layer(x)
    assert (found - expected).abs().max() <= ROUNDING
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", LAYERS)
def test_batch_is_torch_in_training_mode_without_its_updates(name: str) -> None:
    layer, x = layer_and_input(name)
    expected = copy.deepcopy(layer).train()(x)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    with Normalization("batch", fixed_batches=True):
        found = layer(x)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, layer(x))  # the two modes differ, or nothing was tested
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_running_is_differentiable_in_the_statistics() -> None:
    layer, x = layer_and_input("2d")
    layer.eval()
    mean, var = layer.running_mean.requires_grad_(), layer.running_var.requires_grad_()
    with Normalization("running", fixed_batches=True):
        loss = (layer(x) ** 3).sum()
    found = torch.autograd.grad(loss, [x.requires_grad_(), mean, var], allow_unused=True)[1:]
    # By hand: y = (x - m) r w + b with r = (v + eps)^(-1/2):
    # dy/dm = -r w,  dy/dv = -(x - m) w r^3 / 2.
    view = (1, 3, 1, 1)
    r = (var.detach() + 1e-2).rsqrt().view(view)
    w, b = layer.weight.detach().view(view), layer.bias.detach().view(view)
    centred = x.detach() - mean.detach().view(view)
    outer = 3 * (centred * r * w + b) ** 2
    by_mean = (outer * -r * w).sum((0, 2, 3))
    by_var = (outer * -centred * w * r**3 / 2).sum((0, 2, 3))
    # Sums of 40 terms of size up to 1e4, relative rounding of some 1e-14.
    assert torch.allclose(found[0], by_mean, rtol=1e-12, atol=0)
    assert torch.allclose(found[1], by_var, rtol=1e-12, atol=0)


def test_a_layer_without_statistics_takes_the_batch_in_both_modes() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False).double().eval()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    for mode in ("running", "batch"):
        with Normalization(mode, fixed_batches=True):
            assert torch.equal(layer(x), expected)


def test_functional_calls_in_training_mode_take_the_batch_and_update_nothing() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = F.batch_norm(x, None, None, training=True)
    with Normalization("running", fixed_batches=True):
        found = F.batch_norm(x, mean, var, training=True)
    assert torch.equal(found, expected)
    assert torch.equal(mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(var, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("tracked", [True, False])
def test_instance_norm_is_torch_in_evaluation_mode(tracked: bool) -> None:
    random = torch.Generator().manual_seed(5)
    layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=tracked).double().eval()
    if tracked:
        layer.running_mean.copy_(torch.randn(3, generator=random))
        layer.running_var.copy_(torch.rand(3, generator=random) + 0.5)
    x = torch.randn(4, 3, 2, 5, generator=random, dtype=torch.float64)
    expected = layer(x)
    with Normalization("running", fixed_batches=True):
        found = layer(x)
    assert (found - expected).abs().max() <= ROUNDING


def test_nothing_else_changes_and_the_mode_ends_with_its_block() -> None:
    layer, x = layer_and_input("2d")
    layer.eval()
    plain = layer(x)
    with Normalization("batch", fixed_batches=True):
        other = layer(x)
        assert torch.equal(torch.relu(x), x.clamp(min=0))
    assert not torch.equal(plain, other)
    assert torch.equal(layer(x), plain)


def test_use_is_noticed() -> None:
    for module, used in (
        (nn.BatchNorm1d(2), True),
        (nn.InstanceNorm1d(2, track_running_stats=True), True),
        (nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2)), False),
    ):
        with Normalization("running", fixed_batches=False) as mode:
            module.eval()(torch.randn(3, 2, 2))
        assert mode.used is used


class FunctionalNorm(nn.Module):
    """Normalises without a BatchNorm module, by the batch or by buffers of its own."""

    def __init__(self, batch: bool) -> None:
        super().__init__()
        self.linear, self.batch = nn.Linear(3, 2), batch
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.batch_norm(x, self.mean, self.var, training=self.batch))


def losses_of(model: Callable[[], nn.Module], **settings: Any) -> float:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 3, generator=random), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    task = Task(model, {"train": (x, y)}, cross_entropy)
    bench = Workbench(task, Settings(dtype="float64", batch_size=4, **settings))
    out = bench.engine.new_vector()
    first = bench.engine.evaluate(bench.splits[0], out).loss
    assert bench.engine.evaluate(bench.splits[0], out).loss == first
    return first


def test_functional_statistics_follow_the_mode_too() -> None:
    def build(batch: bool) -> Callable[[], nn.Module]:
        def model() -> nn.Module:
            torch.manual_seed(1)
            return FunctionalNorm(batch)

        return model

    by_batch = losses_of(build(True), batch_norm="batch")
    assert losses_of(build(False), batch_norm="batch") == by_batch
    assert losses_of(build(False), batch_norm="running") != by_batch
    with pytest.raises(TaskError, match="normalises by batch statistics outside"):
        losses_of(build(True), batch_norm="running")


@pytest.mark.parametrize(
    ("model", "running", "batch"),
    [
        (nn.BatchNorm1d(2), False, True),
        (nn.BatchNorm1d(2, track_running_stats=False), True, True),
        (nn.InstanceNorm1d(2), False, True),
        (nn.Linear(2, 2), False, True),
    ],
)
def test_when_batches_are_part_of_the_loss(model: nn.Module, running: bool, batch: bool) -> None:
    assert depends_on_batches(nn.Sequential(model), "running") is running
    assert depends_on_batches(nn.Sequential(model), "batch") is batch


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_an_interval_leaves_buffers_counters_and_modes_alone(mode: str) -> None:
    case = convnet(3, "tanh", mode)
    bench = Bench(case)
    bench.run(case.states)
    model = bench.flat.model
    after = case.states[-1]
    # The endpoint is the last point whose loss was taken before the midpoint (Simpson's order).
    assert not any(module.training for module in model.modules())
    bench.segments(case.states)[0].set_point(bench.flat, 1.0)
    bench.engine.evaluate(bench.split, bench.engine.new_vector())
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert int(model.state_dict()["bn1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_losses_are_those_of_torch_in_its_own_mode(mode: str) -> None:
    case = convnet(4, "gelu", mode)
    bench = Bench(case)
    (result,) = bench.run(case.states)
    for state, found in zip(case.states, (result.loss_start, result.loss_end), strict=True):
        total = 0.0
        for batch in bench.split.batches:
            model = case.make().double().eval()
            model.load_state_dict(state)
            if mode == "batch":
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train()
            total += float(classify(model, batch).detach().sum())
        assert abs(found - total / len(case.data[0])) <= ROUNDING


def test_batches_of_batch_mode_are_a_seeded_partition_of_even_sizes() -> None:
    case = convnet(5, "tanh", "batch", n=7)
    x, y = case.data
    numbered = Case(
        case.name, case.make, (x, y, torch.arange(7)), case.loss, case.states, case.groups
    )
    found = []
    for seed in (0, 0, 1):
        split = Bench(numbered, batch_norm="batch", batch_size=3, batch_seed=seed).split
        found.append([batch[2].tolist() for batch in split.batches])
        assert sorted(i for part in found[-1] for i in part) == list(range(7))
        assert sorted(len(part) for part in found[-1]) == [2, 2, 3]
        assert not split.sorted_by_group  # never sorted by group
    assert found[0] == found[1] != found[2]


class Custom(nn.Module):
    """Calls the functional form itself, on buffers that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.fc(x), self.running_mean, self.running_var)
        return h + 0.1 * h**2


class WithModule(nn.Module):
    """The same function, by torch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.fc(x))
        return h + 0.1 * h**2


def test_moving_statistics_of_the_functional_form_are_allocated_too() -> None:
    random = torch.Generator().manual_seed(1)
    data = (
        torch.randn(5, 3, generator=random, dtype=torch.float64),
        torch.randint(3, (5,), generator=random),
    )
    states = random_states(Custom, 1, 2)
    renamed = tuple(
        {n if n.startswith("fc") else f"norm.{n}": value for n, value in state.items()}
        for state in states
    )
    benches = [
        Bench(Case("custom", Custom, data, classify, states)),
        Bench(Case("module", WithModule, data, classify, renamed)),
    ]
    found, expected = (
        bench.by_layer(bench.run(bench_states)[0].lc)
        for bench, bench_states in zip(benches, (states, renamed), strict=True)
    )
    for name, values in found.items():
        assert torch.equal(values, expected[name if name.startswith("fc") else f"norm.{name}"])
    assert found["running_mean"].any() and found["running_var"].any()


class Gated(nn.Module):
    """BatchNorm that is called where a gate is open: a counter of the checkpoint, or an input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("phase", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, open: bool = False) -> Tensor:
        h = self.fc(x)
        return self.out(torch.tanh(self.norm(h) if open or self.phase > 0 else h))


def gated_loss(net: Any, batch: Any) -> Tensor:
    x, y, open = batch
    return F.cross_entropy(net(x, bool(open[0])), y, reduction="none")


def gated_states(*phases: int) -> tuple[dict[str, Tensor], ...]:
    states = random_states(Gated, 4, len(phases))
    return tuple(
        {**state, "phase": torch.tensor(phase)} for state, phase in zip(states, phases, strict=True)
    )


def gated_data(open: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(6, 3, generator=random, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=random), torch.full((6,), open)


def test_a_layer_that_a_later_checkpoint_calls_first() -> None:
    states = gated_states(0, 0, 1, 1)
    case = Case("gated", Gated, gated_data(0), gated_loss, states)
    bench = Bench(case)
    twin = bench.twin(case)
    for (before, after), found in zip(pairwise(states), bench.run(states), strict=True):
        expected = twin.interval(before, after, bench.settings.rule)
        assert closeness(found, expected, bench) <= ROUNDING
        assert abs(found.loss_end - expected.loss_end) <= ROUNDING
    mean = bench.by_layer(found.lc)["norm.running_mean"]
    assert mean.all()  # it moved, and counted


def test_a_layer_that_only_the_second_split_calls() -> None:
    before, after = gated_states(0, 0)
    splits = {"shut": gated_data(0), "open": gated_data(1)}
    found = allocate(Task(Gated, splits, gated_loss), before, after, dtype="float64")
    for name, data in splits.items():
        chunks = [tuple(part[i : i + 1] for part in data) for i in range(6)]
        expected = Twin(Gated, gated_loss, chunks).interval(before, after, "simpson")
        for layer, values in expected.lc.items():
            difference = (found[name].elements[layer] - values).abs().max()
            assert difference <= ROUNDING * expected.scale, (name, layer)


def test_what_came_before_does_not_change_a_bit() -> None:
    states = gated_states(0, 1, 1)
    case = Case("gated", Gated, gated_data(0), gated_loss, states)
    along, alone = Bench(case).run(states)[1], Bench(case).run(states[1:])[0]
    assert torch.equal(along.lc, alone.lc)
    assert (along.loss_start, along.loss_end) == (alone.loss_start, alone.loss_end)


class Checkpointed(WithModule):
    """Saves memory: the backward pass computes the layer again."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["running", "batch"])
def test_layers_that_the_backward_pass_computes_again(mode: str) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=random, dtype=torch.float64)
    data = (x, torch.randint(3, (5,), generator=random))
    states = random_states(WithModule, 1, 2)
    found, expected = (
        Bench(Case("again", make, data, classify, states), batch_norm=mode).run(states)[0]
        for make in (Checkpointed, WithModule)
    )
    assert torch.equal(found.lc, expected.lc) and found.lc.any()


class OfParameters(nn.Module):
    """Statistics that are parameters: neither a module of torch's nor a buffer says so."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("phase", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(x, self.mean, self.var) if self.phase > 0 else x * self.var + self.mean
        return h + 0.1 * h**2


def test_statistics_that_are_parameters() -> None:
    # 1 / sqrt(var + eps), by hand and in torch's words.
    random = torch.Generator().manual_seed(3)
    data = (torch.randn(5, 3, generator=random, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))
    states = [
        {
            "mean": torch.randn(3, generator=random, dtype=torch.float64),
            "var": 0.5 + torch.rand(3, generator=random, dtype=torch.float64),
            "phase": torch.tensor(phase),
        }
        for phase in (0, 1, 1)
    ]
    case = Case("parameters", OfParameters, data, classify, tuple(states))
    found = Bench(case).run(case.states)[1]

    class ByHand(OfParameters):
        def forward(self, x: Tensor) -> Tensor:
            h = (x - self.mean) / torch.sqrt(self.var + 1e-5)
            return h + 0.1 * h**2

    other = replace(case, make=ByHand)
    expected = Bench(other).twin(other).interval(states[1], states[2], "simpson")
    assert closeness(found, expected, Bench(other)) <= ROUNDING


class Single(nn.Module):
    """One buffer of one axis, as of rotary embeddings: no pair of mean and variance."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("frequencies", torch.ones(2))


def test_batch_statistics_are_refused_where_nothing_tells_of_them() -> None:
    def loss(net: Any, batch: Any) -> Tensor:
        h = F.batch_norm(net(batch[0]), None, None, training=True)
        return F.cross_entropy(h, batch[1], reduction="none")

    case = Case("direct", lambda: nn.Linear(3, 3), gated_data(0)[:2], loss, ())
    bench = Bench(case)
    with pytest.raises(TaskError, match="normalises by batch statistics outside"):
        bench.engine.check_statistics(bench.split)


def test_looking_for_batch_statistics_changes_no_bit() -> None:
    # A frozen encoder takes torch's fast path, which is off wherever functions are watched.
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.body.requires_grad_(False)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).sum(1))

    x = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(2))
    case = Case("frozen", Encoder, (x, torch.arange(9) % 3), classify, ())
    bench = Bench(case, dtype="float32")
    first = bench.engine.evaluate(bench.split, None).loss
    bench.engine.check_statistics(bench.split)
    assert bench.engine.evaluate(bench.split, None).loss == first


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2)), False),
        (nn.Sequential(nn.BatchNorm2d(2, affine=False)), True),
        (nn.SyncBatchNorm(2), True),
        (nn.InstanceNorm1d(2, track_running_stats=True), True),
        (Custom(), True),
        (Gated(), True),
        (Single(), False),
    ],
)
def test_the_model_alone_says_whether_it_may_normalize(model: nn.Module, expected: bool) -> None:
    assert may_normalize(model) is expected
