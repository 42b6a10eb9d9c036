"""States of a module's own making: from the recorder through the analysis to the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenes
import torch
from torch import Tensor, nn

import lcray
from lcray.checkpoints import Recorder, open_series
from lcray.errors import CheckpointError, IncompleteError, TaskError
from lcray.tasks.task import Task

pytestmark = pytest.mark.usefixtures("inline")


class Scaled(nn.Linear):
    """Multiplies by a number that is neither parameter nor buffer."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.scale = 1.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.scale])

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state[0])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def build() -> nn.Module:
    return nn.Sequential(Scaled(4, 5), nn.Tanh(), Scaled(5, 3))


scaled = Task(build, scenes.points, scenes.cross_entropy)


def record(run: Path, scales: list[float]) -> None:
    torch.manual_seed(0)
    model = build()
    data = scenes.points()["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].scale = scales[0]
    with Recorder(model, run) as recorder:
        for scale in scales[1:]:
            optimizer.zero_grad()
            scenes.cross_entropy(model, data).mean().backward()
            optimizer.step()
            model[0].scale = scale
            recorder.step()


def losses(run: Path, split: str) -> list[float]:
    """Of a freshly built model that has loaded each checkpoint."""
    found, series = [], open_series(run)
    for step in series.steps:
        fresh = build()
        fresh.load_state_dict(series.read(step).tensors)
        with torch.no_grad():
            found.append(float(scenes.cross_entropy(fresh.eval(), scenes.points()[split]).mean()))
    return found


@pytest.mark.parametrize("scales", [[3.0] * 4, [3.0, 2.0, 0.5, 1.5]], ids=["constant", "moving"])
def test_the_loss_is_that_of_a_model_that_has_loaded_them(
    tmp_path: Path, scales: list[float]
) -> None:
    record(tmp_path / "run", scales)
    found = lcray.analyze(tmp_path / "run", scaled, tmp_path / "out", span_length=2)
    frame = found.intervals()
    for split in ("train", "val"):
        rows, expected = frame[frame["split"] == split], losses(tmp_path / "run", split)
        assert rows["loss_start"].tolist() == pytest.approx(expected[:-1], rel=1e-5)
        assert rows["loss_end"].tolist() == pytest.approx(expected[1:], rel=1e-5)
        if len(set(scales)) == 1:  # nothing else moves than what has LC
            assert rows["lc"].tolist() == pytest.approx(rows["loss_change"].tolist(), rel=1e-2)
    names = {layer.name for layer in found.plan.layers}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_run_without_them_is_refused_unless_the_model_holds_them(tmp_path: Path) -> None:
    """As an older recorder wrote it."""
    from safetensors.torch import load_file, save_file

    record(tmp_path / "run", [1.0] * 3)
    for path in (tmp_path / "run").glob("*.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if not k.endswith("_extra_state")}
        save_file(kept, path)
    with pytest.raises(CheckpointError, match=r"'0\._extra_state' .*missing; pass partial=True"):
        lcray.analyze(tmp_path / "run", scaled, tmp_path / "out")
    lcray.analyze(tmp_path / "run", scaled, tmp_path / "partial", partial=True)


class Picky(Scaled):
    def set_extra_state(self, state: Tensor) -> None:
        raise KeyError("version")


def build_picky() -> nn.Module:
    return nn.Sequential(Picky(4, 3))


def test_a_module_that_cannot_take_its_state_is_refused_in_one_line(tmp_path: Path) -> None:
    with Recorder(build_picky(), tmp_path / "run") as recorder:
        recorder.step()
    task = Task(build_picky, scenes.points, scenes.cross_entropy)
    with pytest.raises((TaskError, IncompleteError), match=r"0\._extra_state': cannot be") as bad:
        lcray.analyze(tmp_path / "run", task, tmp_path / "out")
    assert "\n" not in str(bad.value) and "version" in str(bad.value)
