from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lcray.errors import CheckpointError, TaskError
from lcray.execution.in_memory import Allocation, allocate
from lcray.tasks.model.flat import FlatModel
from lcray.tasks.task import Task

CPU = torch.device("cpu")


class Net(nn.Module):
    """Tied ends, a float buffer, a counter and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + self.shift))


def make_flat(model: nn.Module | None = None, **options: object) -> FlatModel:
    settings: dict = {"dtype": torch.float32, **options}
    return FlatModel(model or Net(), CPU, settings.pop("dtype"), **settings)


def gradients_of(
    flat: FlatModel, x: Tensor, loss: Callable[[Tensor], Tensor] = lambda out: out.pow(2).sum()
) -> dict[str, Tensor]:
    """The gradients that a backward pass of the loss of the model's output hands on, by layer."""
    received: dict[str, Tensor] = {}

    def receive(number: int, gradient: Tensor) -> None:
        assert flat.layers[number].name not in received
        received[flat.layers[number].name] = gradient.clone()

    flat.receiver = receive
    loss(flat.model(x)).backward()
    flat.receiver = None
    return received


def checkpoint() -> dict[str, Tensor]:
    """Values 0, 1, 2, … in the order of the layers; integers for the counter."""
    return {
        "first.weight": torch.arange(9.0).view(3, 3),
        "first.bias": torch.arange(9.0, 12.0),
        "second.bias": torch.arange(12.0, 15.0),
        "shift": torch.arange(15.0, 18.0),
        "count": torch.tensor([4, 5]),
    }


def refusal(flat: FlatModel, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        flat.flatten(tensors, 70)
    message = str(caught.value)
    assert message.startswith("checkpoint at step 70: tensor ") and "\n" not in message
    return message


class TestStorage:
    def test_setting_the_vector_sets_the_model(self) -> None:
        flat = make_flat()
        vector, constants = flat.flatten(checkpoint(), 0)
        assert torch.equal(vector, torch.arange(18.0))
        flat.theta.copy_(vector)
        flat.set_constants(constants)
        for name, stored in checkpoint().items():
            assert torch.equal(flat.model.state_dict()[name], stored), name
        assert flat.model.second.weight is flat.model.first.weight

    def test_gradients_are_handed_on_layer_by_layer_and_let_go(self) -> None:
        flat = make_flat(dtype=torch.float64)
        flat.theta.copy_(torch.linspace(-1, 1, 18))
        x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
        addresses = {name: p.data_ptr() for name, p in flat.model.named_parameters()}
        twin = Net().double()
        twin.load_state_dict(flat.model.state_dict())
        twin(x).pow(2).sum().backward()
        for _ in range(2):
            received = gradients_of(flat, x)
            # Once each, the tied one as well; nothing of what is frozen or does not move.
            assert sorted(received) == ["first.bias", "first.weight"]
            for name, got in received.items():
                wanted = dict(twin.named_parameters())[name].grad.flatten()
                torch.testing.assert_close(got, wanted, rtol=1e-13, atol=0)
                assert got.abs().sum() > 0
            assert all(p.grad is None for p in flat.model.parameters())
        assert {n: p.data_ptr() for n, p in flat.model.named_parameters()} == addresses
        flat.theta.zero_()
        assert not flat.model.first.weight.any(), "still views after a backward pass"

    def test_buffers_get_gradients_while_they_move(self) -> None:
        flat = make_flat()
        number = [layer.name for layer in flat.layers].index("shift")
        x = torch.ones(1, 3)
        for _ in range(2):
            flat.differentiate_buffers(frozenset({number}))
            received = gradients_of(flat, x)
            # The bias enters the same way, so that both derivatives agree.
            assert torch.equal(received["shift"], received["first.bias"])
            assert received["shift"].abs().sum() > 0
            flat.differentiate_buffers(frozenset())
            assert "shift" not in gradients_of(flat, x)
            assert not flat.model.shift.requires_grad

    def test_a_model_may_be_put_on_another_storage(self) -> None:
        model = Net()
        first, x = make_flat(model), torch.ones(1, 3)
        before = gradients_of(first, x)
        second = make_flat(model)
        assert {k: v.tolist() for k, v in gradients_of(second, x).items()} == {
            k: v.tolist() for k, v in before.items()
        }
        # Nor does the model keep the vectors of the one before.
        theta = weakref.ref(first.theta)
        del first
        gc.collect()
        assert theta() is None
        assert gradients_of(second, x).keys() == before.keys()

    def test_sparse_gradients_arrive_dense(self) -> None:
        flat = make_flat(nn.Embedding(4, 2, sparse=True))
        received = gradients_of(flat, torch.tensor([1, 3, 3]), lambda out: out.sum())
        assert received["weight"].tolist() == [0, 0, 1, 1, 0, 0, 2, 2]

    def test_the_model_is_in_evaluation_mode_and_of_the_dtype(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        flat = make_flat(model, dtype=torch.float64)
        assert not any(module.training for module in flat.model.modules())
        assert flat.theta.dtype == torch.float64
        assert model[0].weight.dtype == torch.float64

    def test_the_start_is_the_models_own_state(self) -> None:
        model = nn.Linear(2, 2)
        before = torch.cat([model.weight.detach().flatten(), model.bias.detach()]).clone()
        assert torch.equal(make_flat(model).theta, before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_shared_buffer_is_one_layer_in_every_dtype(self, dtype: torch.dtype) -> None:
        shared = torch.ones(2)
        parts = [nn.Linear(1, 1), nn.Linear(1, 1)]
        for part in parts:
            part.register_buffer("mask", shared)
        flat = make_flat(nn.Sequential(*parts), dtype=dtype)
        masks = [layer for layer in flat.layers if layer.kind == "buffer"]
        assert [(layer.name, layer.aliases) for layer in masks] == [("0.mask", ("1.mask",))]
        flat.theta[flat.slices[-1]] = 7
        assert parts[1].mask.tolist() == [7, 7]


class TestRefusedModels:
    def test_nothing_to_learn(self) -> None:
        for model in (nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)):
            with pytest.raises(TaskError, match="no parameter requires a gradient"):
                make_flat(model)

    def test_lazy_and_complex(self) -> None:
        with pytest.raises(TaskError, match="has no shape yet"):
            make_flat(nn.LazyLinear(2))
        model = nn.Linear(2, 2)
        model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(TaskError, match="'phase': complex numbers"):
            make_flat(model)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.jit.script(nn.Linear(2, 2)),
            lambda: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)),
            lambda: nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))),
        ],
    )
    def test_torchscript(self, make: Callable[[], nn.Module]) -> None:
        self.check(make(), r"model: has a TorchScript module \(Linear\), which cannot be changed")

    def test_a_module_that_has_no_evaluation_mode(self) -> None:
        model = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)).module()
        self.check(model, "model: cannot be set to evaluation mode: NotImplementedError: ")

    def test_parameters_without_values(self) -> None:
        self.check(nn.Linear(2, 2, device="meta"), "model layer 'weight': is a meta tensor")
        with torch.inference_mode():
            model = nn.Linear(2, 2)
        self.check(model, "model layer 'weight': was made in inference mode")

    def check(self, model: nn.Module, message: str) -> None:
        with pytest.raises(TaskError, match=f"^{message}") as caught:
            make_flat(model)
        assert "\n" not in str(caught.value)


class TestCheckpoints:
    def test_a_missing_tensor(self) -> None:
        tensors = checkpoint()
        del tensors["second.bias"]
        message = refusal(make_flat(), tensors)
        assert "'second.bias' of the task's model is missing; pass partial=True" in message

    def test_an_unknown_tensor(self) -> None:
        extra = {"third.weight": torch.ones(1), "third.bias": torch.ones(1)}
        message = refusal(make_flat(), {**checkpoint(), **extra})
        assert "tensor 'third.weight' is not in the task's model (2 such)" in message

    @pytest.mark.parametrize("partial", [False, True])
    def test_another_shape(self, partial: bool) -> None:
        tensors = {**checkpoint(), "first.bias": torch.ones(1, 3)}
        message = refusal(make_flat(partial=partial), tensors)
        assert "'first.bias' has shape [1, 3], but [3] in the task's model" in message

    def test_another_shape_of_an_integer_tensor(self) -> None:
        message = refusal(make_flat(), {**checkpoint(), "count": torch.tensor([1])})
        assert "'count' has shape [1], but [2] in the task's model" in message

    def test_integers_for_a_float(self) -> None:
        message = refusal(make_flat(), {**checkpoint(), "shift": torch.arange(3)})
        assert "'shift' is stored as torch.int64, but the model's is a float" in message

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floats_are_converted(self, dtype: torch.dtype) -> None:
        values = torch.tensor([1 / 3, 1e-3, 2.0])
        vector, _ = make_flat().flatten({**checkpoint(), "shift": values.to(dtype)}, 0)
        assert torch.equal(vector[15:], values.to(dtype).float())

    def test_strided_tensors_are_read_in_their_order(self) -> None:
        stored = torch.arange(9.0).view(3, 3)
        vector, _ = make_flat().flatten({**checkpoint(), "first.weight": stored.t()}, 0)
        assert torch.equal(vector[:9], stored.t().flatten())

    @pytest.mark.parametrize("name", ["first.weight", "second.weight"])
    def test_a_tied_tensor_under_either_name(self, name: str) -> None:
        tensors = checkpoint()
        tied = tensors.pop("first.weight")
        vector, _ = make_flat().flatten({**tensors, name: tied}, 0)
        assert torch.equal(vector, torch.arange(18.0))

    def test_a_tied_tensor_stored_twice_must_agree(self) -> None:
        tensors = checkpoint()
        tensors["second.weight"] = tensors["first.weight"].clone()
        tensors["second.weight"][0, 0] = tensors["first.weight"][0, 0] = torch.nan
        assert make_flat().flatten(tensors, 0)[0].isnan().sum() == 1
        tensors["second.weight"][2, 2] += 1
        message = refusal(make_flat(), tensors)
        assert "'second.weight' differs from 'first.weight', which the task's model ties" in message

    def test_nothing_is_kept_of_a_refused_checkpoint(self) -> None:
        flat = make_flat()
        before = flat.theta.clone()
        refusal(flat, {**checkpoint(), "shift": torch.ones(4)})
        assert torch.equal(flat.theta, before)

    def test_integers_may_be_missing(self) -> None:
        tensors = checkpoint()
        del tensors["count"]
        constants = make_flat().flatten(tensors, 0)[1]
        assert {name: value.tolist() for name, value in constants.items()} == {"count": [0, 0]}


class TestPartial:
    def test_what_is_missing_keeps_the_models_own_values(self) -> None:
        model = Net()
        own = model.second.bias.detach().clone()
        flat = make_flat(model, partial=True)
        flat.theta.fill_(99)  # where the model is at the moment plays no part
        tensors = checkpoint()
        del tensors["second.bias"]
        vector, _ = flat.flatten(tensors, 0)
        assert torch.equal(vector[12:15], own)
        assert torch.equal(vector[:12], torch.arange(12.0))
        assert flat.flatten({}, 0)[0].tolist() != [99.0] * 18

    def test_one_checkpoint_does_not_leak_into_the_next(self) -> None:
        flat = make_flat(partial=True)
        base = flat.flatten({}, 0)[0]
        flat.flatten(checkpoint(), 1)
        assert torch.equal(flat.flatten({}, 2)[0], base)

    def test_unknown_names_are_still_refused(self) -> None:
        assert "not in the task's model" in refusal(
            make_flat(partial=True), {"lora.a": torch.ones(1)}
        )


class Rotary(nn.Module):
    """Pairs of features turned by fixed angles, as rotary position embeddings do it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        angles = torch.tensor([0.3, 1.1])
        self.register_buffer("freqs", torch.polar(torch.ones(2), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.inner(x).unflatten(-1, (2, 2)))
        return torch.view_as_real(pairs * self.freqs).flatten(-2)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_complex_buffers_stay_complex(dtype: torch.dtype, close: float) -> None:
    flat = make_flat(Rotary(), dtype=dtype)
    weight = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)
    bias = torch.tensor([0.5, -0.25, 1.0, 2.0], dtype=torch.float64)
    vector, constants = flat.flatten({"inner.weight": weight, "inner.bias": bias}, 0)
    flat.theta.copy_(vector)
    flat.set_constants(constants)
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=torch.float64)
    found = flat.model(x.to(dtype))
    assert found.dtype == dtype
    a, b, c, d = (x @ weight.T + bias)[0].tolist()
    expected = [
        a * math.cos(0.3) - b * math.sin(0.3),
        a * math.sin(0.3) + b * math.cos(0.3),
        c * math.cos(1.1) - d * math.sin(1.1),
        c * math.sin(1.1) + d * math.cos(1.1),
    ]
    assert found[0].tolist() == pytest.approx(expected, rel=close)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 1)])
def test_a_missing_counter_is_the_models_own_whatever_came_before(order: tuple[int, ...]) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 1, bias=False)
            self.register_buffer("count", torch.tensor(5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.count

    stored = [{"weight": torch.ones(1, 2), "count": torch.tensor(n)} for n in (2, 3, 7)]
    del stored[1]["count"]
    flat = make_flat(Scaled())
    for number in order:
        vector, constants = flat.flatten(stored[number], number)
        flat.theta.copy_(vector)
        flat.set_constants(constants)
        assert float(flat.model(torch.ones(1, 2)).detach()) == 2.0 * (2, 5, 7)[number]


class Rebinding(nn.Module):
    """Assigns what it holds anew in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("c", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.c = self.c.clone()
        return (x * self.w + self.c).sum(-1)


class Clamping(nn.Linear):
    """Gives its weight other memory in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-9, 9)
        return super().forward(x)


def output(net: nn.Module, batch: tuple[Tensor]) -> Tensor:
    x = batch[0][:, None] if isinstance(net, nn.LSTM) else batch[0]  # sequences of one element
    found = net(x)
    return (found[0] if isinstance(found, tuple) else found).flatten(1).square().sum(1)


def zeroing(net: nn.Module, batch: tuple[Tensor]) -> Tensor:
    net.zero_grad()
    return output(net, batch)


def descending(net: nn.Module, batch: tuple[Tensor]) -> Tensor:
    output(net, batch).sum().backward()
    return output(net, batch)


def moved(model: nn.Module, by: float) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moving = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {n: v + by * torch.cos(v) if n in moving else v for n, v in state.items()}


def allocation(make: Callable[[], nn.Module], loss: Callable[..., Tensor] = output) -> Allocation:
    """From the model's own state to one nearby, on five vectors of two numbers."""
    torch.manual_seed(0)
    model = make()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    task = Task(lambda: copy.deepcopy(model), {"train": (x,)}, loss)
    (found,) = allocate(task, moved(model, 0.0), moved(model, 0.05), dtype="float64").values()
    return found


@pytest.mark.parametrize(
    ("make", "loss", "message"),
    [
        (Rebinding, lambda net, batch: net(batch[0]), "model layer 'c': was replaced"),
        (lambda: Clamping(2, 2), output, "model layer 'weight': was replaced"),
        (lambda: nn.Linear(2, 2), descending, r"model layer '\w+': the loss ran a backward pass"),
    ],
)
def test_what_would_spoil_points_or_gradients_is_refused(
    make: Any, loss: Any, message: str
) -> None:
    with pytest.raises(TaskError, match=f"^{message}") as caught:
        allocation(make, loss)
    assert "\n" not in str(caught.value)


def test_a_loss_that_zeroes_gradients_does_no_harm() -> None:
    plain, zeroed = (allocation(lambda: nn.Linear(2, 2), loss) for loss in (output, zeroing))
    assert plain.lc == zeroed.lc != 0.0
    assert abs(zeroed.gap) <= 1e-12  # a quadratic


def shared() -> nn.Module:
    part = nn.Linear(2, 2)
    return nn.Sequential(part, nn.Tanh(), part)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(2, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 3)),
    "LSTM": lambda: nn.LSTM(2, 3, batch_first=True),
    "shared": shared,
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 3)),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 3)),
    "compiled": lambda: torch.compile(nn.Linear(2, 3), backend="eager"),
    "traced by fx": lambda: torch.fx.symbolic_trace(nn.Linear(2, 3)),
    "half": lambda: nn.Sequential(nn.Linear(2, 3).half(), nn.Tanh(), nn.Linear(3, 2).bfloat16()),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_compute_their_weights_stay_tied(name: str) -> None:
    found = allocation(MODELS[name])
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    losses = []
    for by in (0.0, 0.05):
        twin = copy.deepcopy(model)
        twin.load_state_dict(moved(model, by))
        losses.append(float(output(twin.double().eval(), (x,)).mean().detach()))
    change = losses[1] - losses[0]
    assert abs(change) > 1e-4
    assert found.loss_change == pytest.approx(change, rel=1e-9)
    assert found.lc == pytest.approx(change, rel=1e-3)


# --- memory formats -------------------------------------------------------------------------


class Images(nn.Module):
    """A convolution with several channels, a bias, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).amax((2, 3)))


def images_checkpoint() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,)}
    shapes |= {"head.weight": (2, 4), "head.bias": (2,)}
    return {k: torch.randn(v, generator=random) for k, v in shapes.items()}


@pytest.mark.parametrize("through_parts", [False, True])
def test_channels_last_moves_elements_and_nothing_else(through_parts: bool) -> None:
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stored = images_checkpoint()
    gradients = {}
    for memory_format in ("contiguous", "channels_last"):
        flat = make_flat(Images())
        flat.set_memory_format(memory_format)
        vector, parts = flat.new_point()
        if through_parts:
            for name, part in parts.items():
                part.copy_(stored[name])
            vector, _ = flat.flatten(parts, 0, vector, {k: v.dtype for k, v in stored.items()})
        else:
            vector, _ = flat.flatten(stored, 0)
        flat.theta.copy_(vector)
        for name, tensor in flat.model.named_parameters():
            assert torch.equal(tensor, stored[name])
        last = flat.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert last == (memory_format == "channels_last")
        received = gradients_of(flat, x, lambda out: out.square().sum())
        flat.check_tied()
        whole = torch.cat([received[layer.name] for layer in flat.layers])
        gradients[memory_format] = {
            layer.name: flat.layout.shaped(whole, number)
            for number, layer in enumerate(flat.layers)
        }
        twin = Images()
        twin.load_state_dict(stored)
        twin(x).square().sum().backward()
        for name, tensor in twin.named_parameters():
            assert bool(tensor.grad.any())
            torch.testing.assert_close(gradients[memory_format][name], tensor.grad)
    for name, gradient in gradients["contiguous"].items():
        assert torch.allclose(gradient, gradients["channels_last"][name], rtol=1e-5, atol=1e-6)


def test_the_point_and_the_base_move_with_the_format() -> None:
    flat = make_flat(Images(), partial=True)
    before = {name: tensor.clone() for name, tensor in flat.model.named_parameters()}
    for memory_format in ("channels_last", "contiguous", "channels_last"):
        flat.set_memory_format(memory_format)
        for name, tensor in flat.model.named_parameters():
            assert torch.equal(tensor, before[name])
        # A checkpoint that has only the bias: the weight is the base's.
        bias = torch.arange(4.0)
        vector, _ = flat.flatten({"conv.bias": bias}, 0)
        flat.theta.copy_(vector)
        assert torch.equal(flat.model.conv.weight, before["conv.weight"])
        assert torch.equal(flat.model.conv.bias, bias)
        flat.theta.copy_(flat.flatten(before, 0)[0])


def test_what_is_in_place_is_not_copied_and_its_stored_type_is_checked() -> None:
    flat = make_flat()
    vector, parts = flat.new_point()
    for name, part in parts.items():
        part.copy_(checkpoint()[name])
    found, constants = flat.flatten({**parts, "count": torch.tensor([4, 5])}, 70, vector)
    assert found is vector and vector.tolist() == list(range(18))
    assert constants["count"].tolist() == [4, 5]
    wanted = r"is stored as torch\.int64, but the model's is a float"
    with pytest.raises(CheckpointError, match=wanted):
        flat.flatten({**parts, "count": torch.tensor([4, 5])}, 70, vector, {"shift": torch.int64})
