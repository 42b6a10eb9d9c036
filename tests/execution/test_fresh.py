"""The model at a point is the one that would be built there; otherwise it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from strategies import Bench, Case, cases, classify, random_states, vectors
from torch import Tensor, nn

import lcray
from lcray.allocation.path import Point
from lcray.checkpoints import Recorder
from lcray.errors import TaskError
from lcray.execution.in_memory import allocate
from lcray.execution.worker.fresh import check_model
from lcray.execution.worker.workbench import Workbench
from lcray.execution.worker.workspace import Workspace
from lcray.planning.make import make_settings
from lcray.tasks.task import Task

IN_PLACE = r"^model: a loss of .* when its weights are set in place, but .* built anew, loaded"


class Merged(nn.Linear):
    """A low-rank adapter that is merged into the weight on eval(), as loralib's layers are."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.down = nn.Parameter(torch.randn(2, n_in))
        self.up = nn.Parameter(torch.zeros(n_out, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        if self.merged == mode:
            sign = -1.0 if mode else 1.0
            self.weight.data += sign * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Copied(nn.Linear):
    """Pulls towards the weight that it was built with, or so it thinks."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.w0 = self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight - self.w0, self.bias)


class Transposed(nn.Linear):
    """Keeps a view of its weight."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.view = self.weight.detach().t()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.view + self.bias


class Cached(nn.Linear):
    """Computes a table when it is used first."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.tanh(self.weight.detach())
        return F.linear(x, self.weight + self.table, self.bias)


class Derived(nn.Linear):
    """Derives a buffer from the weight when a state dict is loaded."""

    norm: Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("norm", torch.ones(()), persistent=False)
        self.register_load_state_dict_post_hook(self.derive)

    @staticmethod
    def derive(module: Any, _: object) -> None:
        module.norm = module.weight.detach().norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.norm, self.bias)


class Random(nn.Linear):
    """Adds random features that are in no state dict."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.features = torch.randn(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + torch.tanh(x @ self.features)


class Seeded(Random):
    """The same everywhere; plain float32, so that it does not work in float64."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.features = torch.randn(n_in, n_out, generator=torch.Generator().manual_seed(3))


class Rounded(nn.Linear):
    """Rounds its weight and passes the gradient straight through."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.weight + ((4 * self.weight).round() / 4 - self.weight).detach()
        return F.linear(x, rounded, self.bias)


class Detached(nn.Linear):
    """Half of it without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.5 * self.weight + 0.5 * self.weight.detach(), self.bias)


def built_with(layer: Callable[[int, int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6, 3))


def case_of(layer: Callable[[int, int], nn.Module]) -> Case:
    """In float32, as analyses are; states that training could have left, far from the first."""
    make = built_with(layer)
    x, y = vectors(0, 40, 4, 3, False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        states = random_states(make, 0, 3)
    single = tuple({k: v.float() for k, v in state.items()} for state in states)
    return Case(layer.__name__, make, (x.float(), y), classify, single)


@pytest.mark.parametrize("layer", [Merged, Copied, Transposed, Cached, Derived])
def test_what_setting_weights_in_place_misses_is_refused(layer: Any) -> None:
    case = case_of(layer)
    with pytest.raises(TaskError, match=IN_PLACE):
        allocate(case.task, *case.states[:2])


def test_merged_weights_are_refused_though_they_add_up() -> None:
    """The gap is no sign: the factors get 0, the weight all of a smaller change."""
    case = case_of(Merged)
    merged = {**case.states[0]}
    model = case.make()
    model.load_state_dict(merged)
    model.eval()
    new = classify(model, case.data).mean()
    model = case.make().eval()
    model.load_state_dict(merged)
    assert abs(classify(model, case.data).mean() - new) > 0.01, "what the check has to see"


def test_a_model_that_is_not_built_the_same_twice_is_refused() -> None:
    case = case_of(Random)
    with pytest.raises(TaskError, match=r"^model: built twice, it has losses of .* seed what is"):
        allocate(case.task, *case.states[:2])


def test_a_loss_that_is_random_is_called_that() -> None:
    case = case_of(nn.Linear)

    def loss(net: Any, batch: Any) -> Tensor:
        return classify(net, batch) * torch.rand(())

    with pytest.raises(TaskError, match=r"at the same weights; switch sampling"):
        allocate(replace(case.task, loss=loss), *case.states[:2])


@pytest.mark.parametrize("layer", [Rounded, Detached])
def test_losses_that_are_right_with_gradients_that_are_not(layer: Any) -> None:
    case = case_of(layer)
    with pytest.raises(TaskError, match=r"its gradient says that the loss changes by .* detach"):
        allocate(case.task, *case.states[:2])


def test_a_gradient_is_checked_without_float64_as_well() -> None:
    class Both(Seeded, Detached):
        def forward(self, x: Tensor) -> Tensor:
            return Detached.forward(self, x) + torch.tanh(x @ self.features)

    case = case_of(Both)
    with pytest.raises(TaskError, match=r"its gradient says"):
        allocate(case.task, *case.states[:2])


def test_a_kink_is_no_missing_gradient() -> None:
    """ReLU(x·w) of one sample, with the kink right beside the middle of the path."""

    class Kink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * self.w - 0.501).sum(1) + 0.01 * (x * self.w).sum(1)

    task = Task(Kink, {"train": (torch.ones(1, 1),)}, lambda net, batch: net(batch[0]))
    (found,) = allocate(task, {"w": torch.zeros(1)}, {"w": torch.ones(1)}, refine=True).values()
    assert abs(found.loss_change - (1 - 0.501 + 0.01)) < 1e-6


class Casting(nn.Linear):
    """Computes in float32 whatever it gets, as norms of language models do."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.float(), self.weight.float(), self.bias.float())
        return torch.softmax(y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1), 1).to(x.dtype)


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_no_missing_gradient(step: float, seed: int) -> None:
    """Steps as small as those of a warm-up, in a model that is not exact in float64 either."""
    case = case_of(Casting)
    random = torch.Generator().manual_seed(seed)
    after = {
        name: value + step * value.abs().mean() * torch.randn(value.shape, generator=random)
        for name, value in case.states[0].items()
    }

    def loss(net: Any, batch: Any) -> Tensor:
        return classify(net, batch).float() + 100  # of which float32 has five digits left

    (found,) = allocate(replace(case.task, loss=loss), case.states[0], after).values()
    assert math.isfinite(found.lc)


def test_a_missing_gradient_is_found_though_the_first_step_is_tiny(tmp_path: Path) -> None:
    """A later checkpoint tells, where the first interval is all rounding."""

    class Half(Casting):
        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x.float(), (0.3 * self.weight + 0.7 * self.weight.detach()).float())
            return torch.softmax(y, 1).to(x.dtype)

    case = case_of(Half)
    bench = Workbench(case.task, make_settings({}))
    first, later = (bench.flat.flatten(state, n)[0] for n, state in enumerate(case.states[:2]))
    tiny = first + 1e-7 * (later - first)
    points = [Point(n, vector, {}) for n, vector in enumerate((first, tiny, later))]
    with pytest.raises(TaskError, match=r"between steps 0 and 2 its gradient says"):
        check_model(bench, case.task, *points)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_models_of_any_precision_pass(name: str) -> None:
    case = case_of(nn.Linear)
    dtype = getattr(torch, name)
    task = replace(case.task, model=lambda: case.make().to(dtype))
    for computed in ("float32", "float64"):
        (found,) = allocate(task, *case.states[:2], dtype=computed).values()
        twin = Bench(case).twin(case).interval(*case.states[:2], "simpson")
        assert abs(found.lc - twin.total) <= 1e-5 * twin.scale


def test_seeded_random_features_pass_and_are_right() -> None:
    case = case_of(Seeded)
    (found,) = allocate(case.task, *case.states[:2], rule="simpson*8").values()
    assert abs(found.gap) <= 1e-3 * abs(found.loss_change)


@settings(max_examples=40, deadline=None)
@given(cases(heavy=False))
def test_well_behaved_models_pass_in_float32(case: Case) -> None:
    data = tuple(d.float() if d.is_floating_point() else d for d in case.data)
    case = replace(case, data=data)
    (found,) = allocate(case.task, *case.states[:2], **case.options).values()
    assert math.isfinite(found.lc) and math.isfinite(found.loss_change)


def record(make: Callable[[], nn.Module], task: Task, run: Path, steps: int = 6) -> None:
    """Train with momentum and weight decay."""
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=0.05)
    assert isinstance(task.splits, dict)
    with Recorder(model, run) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            losses = task.loss(model, task.splits["train"])
            assert isinstance(losses, Tensor)
            losses.mean().backward()
            for parameter in model.parameters():  # so that weight decay reaches all
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            recorder.step()


class TestRuns:
    def test_the_later_checkpoint_tells_where_the_first_does_not(self, tmp_path: Path) -> None:
        """A model that is built as the run's first checkpoint is right there, and there alone."""

        def make() -> nn.Module:
            torch.manual_seed(1)
            return built_with(Copied)()

        case = case_of(Copied)
        task = replace(case.task, model=make)
        record(make, task, tmp_path / "run")
        work = Workspace(task, str(tmp_path / "run"), make_settings({}))
        with pytest.raises(TaskError, match=r"set in place.*at step 5"):
            work.check()
        work = Workspace(task, str(tmp_path / "run"), make_settings({}), steps="0:1")
        with pytest.raises(TaskError, match=r"set in place.*at step 1"):
            work.check()

    def test_damaged_checkpoints_are_left_to_their_spans(self, tmp_path: Path) -> None:
        case = case_of(nn.Linear)
        run = tmp_path / "run"
        record(case.make, case.task, run)
        for step in (1, 3, 5):
            path = run / f"step-{step:08d}.safetensors"
            tensors = load_file(path)
            tensors["0.bias"][:] = float("nan")
            save_file(tensors, path)
        (run / "step-00000005.safetensors").write_bytes(b"torn")
        found = Workspace(case.task, str(run), make_settings({})).check()
        assert (found.unreached, found.frozen) == ((), ())

    @pytest.mark.usefixtures("inline")
    def test_layers_without_gradients_are_named(self, tmp_path: Path) -> None:
        """Frozen by the task but moved by the run; moved by weight decay alone."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
                self.unused = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.b(torch.tanh(self.a(x)))
                return y

        def frozen() -> nn.Module:
            model = Net()
            model.b.requires_grad_(False)
            return model

        x, y = vectors(0, 40, 4, 3, False)
        task = Task(Net, {"train": (x.float(), y)}, classify)
        record(Net, task, tmp_path / "run")
        lost = "layer 'unused.weight' (and 1 more) moves, but the loss gives it no gradient"
        kept = "layer 'b.weight' (and 1 more) moved during training, but the task's model freezes"
        found = lcray.plan(tmp_path / "run", task)
        assert [note.startswith(lost) for note in found.notes] == [True]
        out = lcray.analyze(tmp_path / "run", replace(task, model=frozen), tmp_path / "out")
        assert [n.startswith(kept) for n in out.notes] == [True, False]
        assert out.notes[1].startswith(lost)
        layers = out.layers().groupby("layer").lc.agg(lambda lc: lc.abs().sum())
        assert (layers[["b.weight", "b.bias", "unused.weight", "unused.bias"]] == 0).all()
        assert (layers[["a.weight", "a.bias"]] > 0).all()


class Conditional(nn.Module):
    """Takes a copy of the weight for samples whose last number is large, and for no others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.w0 = self.a.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 3:] > 1, F.linear(x, self.w0), self.a(x))


@pytest.mark.parametrize("groups", [None, lambda batch: batch[1]])
def test_samples_of_all_groups_are_compared(groups: Any) -> None:
    """Data that lie sorted by class, and batches that are: the first ones tell nothing."""
    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = torch.linspace(-2, 2, 600)
    y = (x[:, 3] > 1).long() * 2
    states = [{k: v + n for k, v in Conditional().state_dict().items()} for n in range(2)]
    task = Task(Conditional, {"train": (x, y)}, classify, groups)
    with pytest.raises(TaskError, match=IN_PLACE):
        allocate(task, *states)


def test_a_model_that_is_shared_is_one_line() -> None:
    shared = nn.Linear(4, 6)
    case = case_of(nn.Linear)

    def make() -> nn.Module:
        return nn.Sequential(shared, nn.Tanh(), nn.Linear(6, 3))

    with pytest.raises(
        TaskError, match=r"layer '0.weight': is the same tensor each time .*deepcopy"
    ):
        allocate(replace(case.task, model=make), *case.states[:2])


def test_methods_that_are_not_as_torchs_are() -> None:
    class Net(nn.Sequential):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            super().load_state_dict(state)

    case = case_of(nn.Linear)
    (found,) = allocate(
        replace(case.task, model=lambda: Net(*case.make().children())), *case.states[:2]
    ).values()
    (same,) = allocate(case.task, *case.states[:2]).values()
    assert found.lc == same.lc


@pytest.mark.parametrize("seed", range(8))
def test_kinks_without_float64_are_no_missing_gradient(seed: int) -> None:
    """Class weights in float32 keep the loss from float64; a step crosses many ReLUs."""
    weight = torch.tensor([0.5, 1.0, 2.0])

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3))

    def loss(net: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1], weight, reduction="none")

    torch.manual_seed(seed)
    states = [make().state_dict() for _ in range(2)]
    x, y = vectors(seed, 40, 4, 3, False)
    (found,) = allocate(Task(make, {"train": (x.float(), y)}, loss), *states).values()
    assert math.isfinite(found.gap)


def test_allocate_names_what_it_cannot_tell() -> None:
    case = case_of(nn.Linear)

    def frozen() -> nn.Module:
        model = case.make()
        next(model.parameters()).requires_grad_(False)
        return model

    (found,) = allocate(replace(case.task, model=frozen), *case.states[:2]).values()
    (note,) = found.notes
    assert note.startswith("layer '0.weight' moved during training, but the task's model freezes")
    assert allocate(case.task, *case.states[:2])["train"].notes == ()
