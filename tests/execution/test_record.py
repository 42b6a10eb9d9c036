"""``analysis.json``: it comes back as it was, and differences are found by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scenes
import torch

import lcray
from lcray.cli.display.results import summary
from lcray.errors import OutputError, UsageError
from lcray.execution.driver.record import (
    carrier_versions,
    check_plan_fits,
    check_plan_losses,
    check_same_numbers,
    check_same_settings,
    make_fingerprint,
    make_notes,
)
from lcray.execution.worker.descriptions import Description
from lcray.settings import Settings
from lcray.tables.output import Output
from lcray.tables.record import Record
from lcray.tasks.layer import Layer

OUT = Path("OUT")


@pytest.fixture
def record(plain_out: Path) -> Record:
    found = Output(plain_out).existing()
    assert found is not None
    return found


def describe(record: Record, **changes: Any) -> Description:
    made = Description(
        layers=record.plan.layers,
        split_hashes={"train": "aa", "val": "bb"},
        source_hash="cc",
        base_hash="",
        first_hash="dd",
        device_kind="cpu",
        device="cpu",
    )
    return replace(made, **changes)


def test_it_comes_back_as_it_was(record: Record, tmp_path: Path) -> None:
    made = replace(record, notes=("a — note",), task="x:y")
    Output(tmp_path).write(made)
    assert Output(tmp_path).existing() == made
    assert [path.name for path in tmp_path.iterdir()] == ["analysis.json"]


def test_nothing_there(tmp_path: Path) -> None:
    assert Output(tmp_path).existing() is None
    assert Output(tmp_path / "none").existing() is None


def test_what_it_says(record: Record, plain_run: Path) -> None:
    assert record.run == str(plain_run)
    assert record.task == "scenes:plain"
    assert set(record.fingerprint) == {
        "task source", "data", "base model", "first checkpoint",
        "device", "lcray", "torch", "numpy",
    }  # fmt: skip
    assert record.fingerprint["lcray"] == lcray.__version__
    assert set(record.versions) == {"python", "ray", "pyarrow", "safetensors", "scipy"}
    assert record.versions == carrier_versions()


def test_settings_that_went_through_json_are_the_same(record: Record) -> None:
    settings = Settings(splits=("train", "val"), trace=("0.weight:1",), rtol=1e-7)
    data = json.loads(json.dumps(replace(record.plan, settings=settings).to_dict()))
    there = replace(record, plan=type(record.plan).from_dict(data))
    check_same_settings(OUT, there, settings)
    with pytest.raises(OutputError, match=r"\(rtol: 1e-07 there, 0\.001 now; splits: "):
        check_same_settings(OUT, there, replace(settings, rtol=1e-3, splits=("train",)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source_hash": "xx"}, "task source: 'cc' there, 'xx' now"),
        ({"split_hashes": {"train": "aa", "val": "x"}}, "data: "),
        ({"base_hash": "ee"}, "base model: '' there, 'ee' now"),
        ({"first_hash": "f" * 64}, f"first checkpoint: 'dd' there, '{'f' * 15}… now"),
        ({"device": "H200", "device_kind": "cuda"}, "device: 'cpu' there, 'H200' now"),
    ],
)
def test_each_difference_is_named_alone(change: dict[str, Any], named: str, record: Record) -> None:
    here = describe(record)
    there = replace(record, fingerprint=make_fingerprint(here))
    check_same_numbers(OUT, there, here, here.layers)
    with pytest.raises(OutputError) as caught:
        check_same_numbers(OUT, there, describe(record, **change), here.layers)
    text = str(caught.value)
    what = (
        f"the analysis of another run, {there.run}"
        if "first_hash" in change
        else "another analysis"
    )
    assert text.startswith(f"OUT: holds {what} ({named}")
    assert text.split(");")[0].count(" there, ") == 1


def test_other_layers(record: Record) -> None:
    here = describe(record)
    there = replace(record, fingerprint=make_fingerprint(here))
    with pytest.raises(OutputError, match=r"\(the model's layers\)"):
        check_same_numbers(OUT, there, here, here.layers[:-1])
    grouped = (replace(here.layers[0], unit_groups=2), *here.layers[1:])
    with pytest.raises(OutputError, match="added up there, one per channel now"):
        check_same_numbers(OUT, there, here, grouped)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": ()}, "layers"),
        ({"split_hashes": {"val": "bb", "train": "aa"}}, "splits"),
        ({"device_kind": "cuda"}, "device"),
        ({"drawn": {"train": (10, 17)}}, "samples"),
    ],
)
def test_a_plan_must_fit(change: dict[str, Any], named: str, record: Record) -> None:
    check_plan_fits(record.plan, describe(record))
    with pytest.raises(UsageError, match=f"^plan: made for other {named}; make a new plan"):
        check_plan_fits(record.plan, describe(record, **change))


def test_a_plan_must_have_the_losses(record: Record) -> None:
    losses = {split.name: split.first_loss or math.nan for split in record.plan.splits}
    check_plan_losses(record.plan, losses)
    for loss in (losses["val"] * 1.001, math.nan):
        with pytest.raises(UsageError, match=r"^plan: made for another run.* split 'val' had"):
            check_plan_losses(record.plan, {**losses, "val": loss})
    splits = tuple(replace(split, first_loss=None) for split in record.plan.splits)
    check_plan_losses(replace(record.plan, splits=splits), dict.fromkeys(losses, math.nan))


def test_notes(record: Record) -> None:
    layers: tuple[Layer, ...] = record.plan.layers
    plain = record.plan.settings
    assert make_notes(describe(record), plain) == ()
    (note,) = make_notes(describe(record, low_precision=(layers[1].name,)), plain)
    assert note.startswith(f"1 of {len(layers)} layers are stored in 16 bits or fewer")
    assert note.endswith(f"({layers[1].name}, …)")


@pytest.mark.usefixtures("inline")
def test_a_missing_step_0_is_said_by_the_plan_and_by_the_results(
    plain_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(plain_run, tmp_path / "run"))
    assert lcray.plan(run, "scenes:plain", steps="1:").notes == ()  # left out on purpose
    scenes.checkpoint(run, 0).unlink()
    report = lcray.plan(run, "scenes:plain")
    assert report.notes[0].startswith("the run begins at step 1: step 0 is missing")
    assert lcray.plan(run, "scenes:plain", steps="2:").notes == ()
    asked = {"out": {"steps": "1:4"}, "by-plan": {"plan": report.plan}}
    for name, options in asked.items():
        found = lcray.analyze(run, "scenes:plain", tmp_path / name, **options)
        assert found.notes == report.notes
        assert report.notes[0] in "".join(map(str, summary(found).renderables))
    page = lcray.report(tmp_path / "out")
    assert isinstance(page, Path) and report.notes[0] in page.read_text()


def test_batches_that_are_part_of_the_loss_are_noted_unless_asked_for(record: Record) -> None:
    found = describe(record, fixed_batches=True)
    (note,) = make_notes(found, Settings(batch_norm="batch"))
    assert note.startswith("batches of up to 256 samples: BatchNorm takes their statistics")
    assert "not tuned; --batch-size sets it" in note
    assert make_notes(found, Settings(batch_norm="batch", batch_size=256)) == ()
    assert make_notes(describe(record), Settings()) == ()


@pytest.mark.usefixtures("inline")
def test_a_loss_that_closes_over_another_value_is_refused(plain_run: Path, tmp_path: Path) -> None:
    """By its value, as a tensor is nothing that the fingerprint looks into."""
    out = tmp_path / "out"
    lcray.analyze(plain_run, scenes.with_loss(scaled_loss, torch.tensor(1.0)), out, span_length=6)
    before = scenes.tables(out)
    lcray.analyze(plain_run, scenes.with_loss(scaled_loss, torch.tensor(1.0)), out, span_length=6)
    with pytest.raises(OutputError, match=r"\(loss of 'train' at the first step: .* there, "):
        lcray.analyze(
            plain_run, scenes.with_loss(scaled_loss, torch.tensor(1.5)), out, span_length=6
        )
    assert scenes.tables(out) == before


def scaled_loss(factor: torch.Tensor, model: Any, batch: scenes.Pair) -> Any:
    return factor * scenes.cross_entropy(model, batch)


@pytest.mark.usefixtures("inline")
def test_float64_checkpoints_in_float32_are_noted(tmp_path: Path) -> None:
    run = scenes.record(scenes.plain, tmp_path / "run", steps=2, dtype=torch.float64)
    notes = []
    for dtype in ("float32", "float64"):
        lcray.analyze(run, "scenes:plain", tmp_path / dtype, dtype=dtype)
        found = Output(tmp_path / dtype).existing()
        assert found is not None
        notes.append(found.notes)
    ((note,), none) = notes
    assert "stored in float64 but analyzed in float32" in note and "--dtype float64" in note
    assert note.startswith("4 of 4 layers")
    assert none == ()
