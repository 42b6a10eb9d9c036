from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lcray.errors import CheckpointError, TaskError
from lcray.storage.json_types import build
from lcray.tasks.layer import Layer
from lcray.tasks.model.layers import describe_layers, extra_owners


def named(model: nn.Module) -> dict[str, Layer]:
    return {layer.name: layer for layer in describe_layers(model)[0]}


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mask", torch.ones(3, 3))
        self.register_buffer("counter", torch.zeros(2, dtype=torch.long))
        self.register_buffer("scratch", torch.ones(5), persistent=False)


class Conv1D(nn.Module):
    """As in transformers: the weight is [in, out]."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, out))
        self.bias = nn.Parameter(torch.zeros(out))


def test_order_is_parameters_first_then_buffers_each_in_the_models_order() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    assert list(named(model)) == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"),
        *("1.running_mean", "1.running_var"),
    ]


def test_tied_tensors_are_one_layer_under_the_first_name() -> None:
    layers = named(TiedNet())
    assert layers["embed.weight"].aliases == ("head.weight",)
    assert "head.weight" not in layers
    assert layers["body.weight"].aliases == ()
    tensors = describe_layers(TiedNet())[1]
    assert tensors["head.weight"] is tensors["embed.weight"]


def test_a_module_that_is_used_twice_is_tied_throughout() -> None:
    block = nn.Linear(2, 2)
    layers = named(nn.Sequential(block, nn.ReLU(), block))
    assert {name: layer.aliases for name, layer in layers.items()} == {
        "0.weight": ("2.weight",),
        "0.bias": ("2.bias",),
    }


def test_buffers_that_are_saved_and_float_are_layers_and_no_others() -> None:
    layers = named(TiedNet())
    assert layers["mask"].kind == "buffer" and not layers["mask"].trainable
    assert not {"counter", "scratch"} & set(layers)
    tensors = describe_layers(TiedNet())[1]
    assert "counter" in tensors, "checkpoints have it, so its name is known"
    assert "scratch" not in tensors


def test_owners_sizes_and_root() -> None:
    layers = named(TiedNet())
    assert layers["scale"] == Layer("scale", "", "parameter", (), None, True)
    assert (layers["scale"].numel, layers["scale"].n_units) == (1, 1)
    assert layers["body.weight"].module == "body"
    assert layers["embed.weight"].numel == 28


@pytest.mark.parametrize(
    ("module", "name", "axis", "units"),
    [
        (nn.Linear(3, 5), "weight", 0, 5),
        (nn.Linear(3, 5), "bias", 0, 5),
        (nn.Conv2d(3, 5, 2), "weight", 0, 5),
        (nn.Conv1d(4, 6, 2, groups=2), "weight", 0, 6),
        (nn.ConvTranspose2d(3, 5, 2), "weight", 1, 5),
        (nn.ConvTranspose2d(3, 5, 2), "bias", 0, 5),
        (nn.ConvTranspose1d(3, 5, 2), "weight", 1, 5),
        (nn.ConvTranspose3d(3, 5, 2), "weight", 1, 5),
        (nn.ConvTranspose2d(4, 12, 2, groups=2), "weight", 1, 12),
        (nn.ConvTranspose1d(6, 9, 2, groups=3), "weight", 1, 9),
        (nn.ConvTranspose1d(6, 6, 2, groups=6), "weight", 1, 6),
        (nn.ConvTranspose1d(6, 9, 2, groups=3), "bias", 0, 9),
        (Conv1D(5, 3), "weight", 1, 5),
        (Conv1D(5, 3), "bias", 0, 5),
        (nn.Embedding(7, 4), "weight", 0, 7),
        (nn.LayerNorm(4), "weight", 0, 4),
        (nn.BatchNorm2d(4), "running_var", 0, 4),
        (nn.GRUCell(2, 3), "weight_ih", 0, 9),
    ],
)
def test_units_lie_along_the_output(module: nn.Module, name: str, axis: int, units: int) -> None:
    layer = named(nn.Sequential(module))[f"0.{name}"]
    assert (layer.unit_axis, layer.n_units) == (axis, units)


def test_the_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = named(nn.Sequential(pytorch_utils.Conv1D(6, 4)))["0.weight"]
    assert (layer.shape, layer.unit_axis, layer.n_units) == ((4, 6), 1, 6)


def test_a_subclass_of_a_transposed_convolution_is_one() -> None:
    class Up(nn.ConvTranspose2d):
        pass

    assert named(nn.Sequential(Up(3, 5, 2)))["0.weight"].unit_axis == 1
    up = Up(4, 6, 2, groups=2)
    up.factor = nn.Parameter(torch.zeros(6, 2))  # another tensor that it owns has no groups
    layers = named(nn.Sequential(up))
    assert (layers["0.weight"].n_units, layers["0.factor"].n_units) == (6, 2)


def test_layers_are_written_as_they_were_before_groups_of_units() -> None:
    """Digests of old plans stay, and layers that say nothing of groups have none."""
    plain = named(nn.Sequential(nn.ConvTranspose2d(3, 5, 2)))["0.weight"]
    keys = ["name", "module", "kind", "shape", "unit_axis", "trainable", "aliases"]
    assert list(plain.to_dict()) == keys
    assert build(Layer, plain.to_dict()) == plain and plain.unit_groups == 1
    grouped = named(nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2)))["0.weight"]
    assert list(grouped.to_dict()) == [*keys, "unit_groups"]
    assert build(Layer, grouped.to_dict()) == grouped and grouped.unit_groups == 2


def test_frozen_parameters_are_parameters_that_are_not_trainable() -> None:
    model = nn.Linear(2, 3)
    model.weight.requires_grad_(False)
    layers = named(model)
    assert (layers["weight"].kind, layers["weight"].trainable) == ("parameter", False)
    assert layers["bias"].trainable


def test_wrapper_prefixes_go() -> None:
    class Wrapper(nn.Module):
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.add_module(name, inner)

    inner = nn.Sequential(nn.Linear(2, 2))
    wrapped = Wrapper("module", Wrapper("_orig_mod", inner))
    assert list(named(wrapped)) == ["0.weight", "0.bias"]
    assert named(wrapped)["0.weight"].module == "0"
    beside = Wrapper("module", inner)
    beside.extra = nn.Parameter(torch.ones(1))
    assert "module.0.weight" in named(beside), "not a wrapper, as other names lack the prefix"


def test_names_that_become_one_are_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(1, 1)
            self._orig_mod = nn.Module()
            self._orig_mod.a = nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match=r"both 'a\.weight'"):
        describe_layers(Both())


def test_lazy_and_complex_parameters_are_refused() -> None:
    with pytest.raises(TaskError, match=r"^model layer '0\.weight': has no shape yet; run one"):
        describe_layers(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Linear(2, 2)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TaskError, match=r"^model layer 'extra': complex numbers are not"):
        describe_layers(model)


def test_extra_state_that_is_no_tensor_is_ignored() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"version": 3}

    assert list(named(Extra(2, 2))) == ["weight", "bias"]


def test_extra_state_that_is_a_tensor_is_no_layer_and_has_to_be_loadable() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(3)

    class Loadable(Extra):
        def set_extra_state(self, state: torch.Tensor) -> None:
            pass

    model = nn.Sequential(Loadable(2, 2))
    assert list(named(model)) == ["0.weight", "0.bias"]
    assert extra_owners(model) == {"0._extra_state": model[0]}
    with pytest.raises(TaskError, match=r"^model '_extra_state': .* no set_extra_state"):
        extra_owners(Extra(2, 2))


def test_layers_survive_json() -> None:
    for layer in named(TiedNet()).values():
        assert build(Layer, json.loads(json.dumps(layer.to_dict()))) == layer
