"""Lightning: the callback in real trainings, under both of the library's names."""

from __future__ import annotations

import importlib
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenes import cross_entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lcray
from lcray.checkpoints import open_series
from lcray.errors import RecorderError, UsageError
from lcray.tasks.task import Task

pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*is smaller than the logging interval",
        "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated",
        "ignore:.*You defined a `validation_step`",
        "ignore:.*`ModelCheckpoint` not configured",
        "ignore:Checkpoint directory .* exists and is not empty",
        "ignore:.*LeafSpec",
        "ignore::DeprecationWarning:torch.*",
    ),
]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator)
    return x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3))


def library(name: str) -> SimpleNamespace:
    """The parts of the library under one of its names, and a module that trains with them."""
    with warnings.catch_warnings():  # of its imports
        warnings.simplefilter("ignore")
        parts = importlib.import_module("lightning.pytorch" if name == "lightning" else name)
        ours = importlib.import_module(f"lcray.integrations.{name}")

    class Net(parts.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, batch: Any, number: int) -> Tensor:
            return cross_entropy(self.model, batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    class Manual(Net):
        """Two optimizers that take turns; the second one only every other batch."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, number: int) -> None:
            for optimizer in self.optimizers()[: 1 + number % 2]:
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.model, batch).mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = (self.model[0], self.model[3])
            return [torch.optim.SGD(part.parameters(), lr=0.3) for part in parts]

    return SimpleNamespace(parts=parts, Callback=ours.RecorderCallback, Net=Net, Manual=Manual)


def train(
    lib: SimpleNamespace, folder: Path, *callbacks: Any, kind: str = "Net", **options: Any
) -> tuple[dict[str, Tensor], Any]:
    """Train on 4 batches of 6 an epoch; the weights and the trainer."""
    resume = options.pop("ckpt_path", None)
    torch.manual_seed(3)
    module = getattr(lib, kind)()
    usual = {"max_epochs": 1, "enable_checkpointing": False, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lib.parts.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **usual, **options}
    )
    trainer.fit(module, DataLoader(TensorDataset(*data()), 6), ckpt_path=resume)
    return {name: value.clone() for name, value in module.state_dict().items()}, trainer


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["lightning", pytest.param("pytorch_lightning")])
def test_a_training_records_and_the_run_closes(tmp_path: Path, name: str) -> None:
    lib = library(name)
    plain, _ = train(lib, tmp_path)
    weights, _ = train(lib, tmp_path, lib.Callback(tmp_path / "run"))
    assert equal(plain, weights)
    series = open_series(tmp_path / "run")
    assert series.steps == (0, 1, 2, 3, 4)
    assert equal(series.read(4).tensors, weights)  # names as in the module's state dict
    torch.manual_seed(3)
    assert equal(series.read(0).tensors, lib.Net().state_dict())

    train(lib, tmp_path, lib.Callback(tmp_path / "inner", module="model"))
    series = open_series(tmp_path / "inner")
    before, after = series.read(0).tensors, series.read(4).tensors
    assert after.keys() == build().state_dict().keys()
    found = lcray.allocate(
        Task(build, {"train": data()}, cross_entropy), before, after, dtype="float64"
    )
    model, losses = build().double().eval(), []
    for state in (before, after):
        model.load_state_dict(state)
        losses.append(F.cross_entropy(model(data()[0].double()), data()[1]).item())
    assert found["train"].loss_change == pytest.approx(losses[1] - losses[0], rel=1e-9)
    assert abs(found["train"].gap) < 0.02 * abs(found["train"].loss_change)


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    lib = library("lightning")
    callback = lib.Callback(tmp_path / "run", every=2)
    weights, trainer = train(lib, tmp_path, callback, accumulate_grad_batches=3, max_epochs=3)
    # 4 batches an epoch: a step after the third, and one with what is left at the end.
    assert trainer.global_step == 6
    series = open_series(tmp_path / "run")
    assert series.steps == (0, 2, 4, 6)
    assert equal(series.read(6).tensors, weights)


def test_manual_optimization_counts_every_optimizers_steps_once(tmp_path: Path) -> None:
    lib = library("lightning")
    plain, _ = train(lib, tmp_path, kind="Manual")
    weights, trainer = train(lib, tmp_path, lib.Callback(tmp_path / "run"), kind="Manual")
    assert equal(plain, weights)
    assert trainer.global_step == 6  # of 4 batches, two of them with both optimizers
    series = open_series(tmp_path / "run")
    assert series.steps == tuple(range(7))
    assert equal(series.read(6).tensors, weights)
    for optimizer in trainer.optimizers:
        optimizer.step()  # the hooks are gone with the recorder
    states = [series.read(step).tensors for step in series.steps]
    for step, moved in enumerate(["0", "0", "3", "0", "0", "3"]):  # which part each step moved
        changed = {n for n in weights if not torch.equal(states[step][n], states[step + 1][n])}
        assert changed == {f"model.{moved}.weight", f"model.{moved}.bias"}


def test_updates_that_the_scaler_skips_are_steps_without_movement(tmp_path: Path) -> None:
    lib = library("lightning")

    class Overflows(lib.Net):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any, number: int) -> Tensor:
            found = super().training_step(batch, number)
            return found * float("inf") if number == 1 else found

    lib.Overflows = Overflows
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = lib.parts.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    callback = lib.Callback(tmp_path / "run")
    _, trainer = train(lib, tmp_path, callback, kind="Overflows", plugins=[plugin])
    series = open_series(tmp_path / "run")
    assert trainer.global_step == 4 and series.steps == (0, 1, 2, 3, 4)
    states = [series.read(step).tensors for step in series.steps]
    same = [equal(one, two) for one, two in pairwise(states)]
    assert same == [False, True, False, False]


def test_resuming_appends(tmp_path: Path) -> None:
    lib = library("lightning")
    first, second = (lib.Callback(tmp_path / "run") for _ in range(2))
    _, trainer = train(lib, tmp_path, first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    weights, _ = train(lib, tmp_path, second, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    series = open_series(tmp_path / "run")
    assert series.steps == tuple(range(9))
    assert equal(series.read(8).tensors, weights)
    with pytest.raises(RecorderError, match="has checkpoints later than start=0"):
        train(lib, tmp_path, lib.Callback(tmp_path / "run"))


def test_a_submodule_that_is_not_there(tmp_path: Path) -> None:
    lib = library("lightning")
    with pytest.raises(UsageError, match="module 'net': the LightningModule has none; it has mod"):
        train(lib, tmp_path, lib.Callback(tmp_path / "run", module="net"))


def test_an_error_in_training_leaves_a_whole_run(tmp_path: Path) -> None:
    lib = library("lightning")

    class Fails(lib.Net):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any, number: int) -> Tensor:
            if number == 2:
                raise ValueError("no more")
            return super().training_step(batch, number)

    lib.Fails = Fails
    with pytest.raises(ValueError, match="no more"):
        train(lib, tmp_path, lib.Callback(tmp_path / "run"), kind="Fails")
    assert open_series(tmp_path / "run").steps == (0, 1, 2)
    lcray.Recorder(lib.Net(), tmp_path / "other").close()  # and its lock is given back
