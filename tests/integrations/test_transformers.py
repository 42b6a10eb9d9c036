"""Transformers: the callback in a real Trainer, and tasks whose losses are those of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lcray
from lcray.checkpoints import open_series
from lcray.errors import RecorderError, TaskError
from lcray.tasks.task import Task, source_hash

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lcray.integrations.transformers import (  # noqa: E402
    RecorderCallback,
    classification_task,
    language_model_task,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*'pin_memory' argument is set as true:UserWarning",
        "ignore::DeprecationWarning:torch.*",
    ),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def gpt2(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2Config(**{**sizes, **ends, **changes})


def distilbert(**changes: Any) -> DistilBertConfig:
    sizes = {"vocab_size": 31, "max_position_embeddings": 12, "dim": 8, "n_layers": 1}
    return DistilBertConfig(**{**sizes, "n_heads": 2, "hidden_dim": 16, **changes})


def bert(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": 31, "max_position_embeddings": 12, "hidden_size": 8}
    more = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(**{**sizes, **more, **changes})


def sentences(n: int = 10, labels: bool = True) -> list[dict[str, list[int]]]:
    """Of 3 to 9 tokens; the labels of the first are left out of the loss."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(n):
        length = 3 + number % 7
        ids = torch.randint(1, 31, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * length}
        found.append(row | ({"labels": [-100, -100, *ids[2:]]} if labels else {}))
    return found


def blocks(n: int = 16) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(31, (n, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def model_of(task: Task) -> torch.nn.Module:
    set_seed(5)
    return task.model().double().eval()


def loss_of(task: Task, model: torch.nn.Module, size: int) -> float:
    """Σ w ℓ / Σ w over batches of `size`."""
    data, total, weight = task.splits["train"], 0.0, 0.0
    for start in range(0, len(data), size):
        batch = task.collate(data[start : start + size])
        found = task.loss(model, batch)
        losses, weights = found if isinstance(found, tuple) else (found, torch.ones(len(found)))
        total, weight = total + (losses * weights).sum().item(), weight + weights.sum().item()
    return total / weight


@pytest.fixture
def no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes its losses in float32, even of a model in float64: not here."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def padded(rows: list[dict[str, list[int]]], name: str, value: int) -> torch.Tensor:
    longest = max(len(row["input_ids"]) for row in rows)
    return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("labels", [True, False])
def test_a_causal_loss_is_the_librarys_own_over_all_data(labels: bool, no_rounding: None) -> None:
    task = language_model_task(gpt2(), sentences(labels=labels))
    model, rows = model_of(task), sentences(labels=labels)
    if not labels:
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    whole = {"input_ids": padded(rows, "input_ids", 0), "labels": padded(rows, "labels", -100)}
    own = model(**whole, attention_mask=padded(rows, "attention_mask", 0)).loss.item()
    for size in (1, 3, 10):  # padding and the size of a batch do not count
        assert loss_of(task, model, size) == pytest.approx(own, rel=1e-10, abs=0)


@torch.no_grad()
def test_every_token_counts_once() -> None:
    task = language_model_task(gpt2(), sentences())
    losses, weights = task.loss(model_of(task), task.collate(sentences()))
    assert losses.shape == weights.shape == (10 * 8,)
    assert weights.sum() == sum(len(row["input_ids"]) - 2 for row in sentences())
    assert set(losses[weights == 0].tolist()) == {0.0}


@torch.no_grad()
def test_a_masked_loss_is_the_librarys_own(no_rounding: None) -> None:
    rows = sentences()
    task = language_model_task(bert(), rows, masked=True)
    model = model_of(task)
    whole = {"input_ids": padded(rows, "input_ids", 0), "labels": padded(rows, "labels", -100)}
    own = model(**whole, attention_mask=padded(rows, "attention_mask", 0)).loss.item()
    assert loss_of(task, model, 3) == pytest.approx(own, rel=1e-10, abs=0)


LABELS: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "classes": ({"num_labels": 3}, lambda i: i % 3),
    "classes, some unknown": ({"num_labels": 3}, lambda i: i % 3 if i % 4 else -100),
    "regression": ({"num_labels": 1}, lambda i: i / 3),
    "two numbers": ({"num_labels": 2, "problem_type": "regression"}, lambda i: [i / 3, 1.0 - i]),
    "several": ({"num_labels": 3}, lambda i: [float(i % 2), 1.0, 0.0]),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("make", [distilbert, bert])
def test_a_classifiers_loss_is_the_librarys_own(
    kind: str, make: Callable[..., Any], no_rounding: None
) -> None:
    changes, label = LABELS[kind]
    rows = [row | {"labels": label(i)} for i, row in enumerate(sentences())]
    task = classification_task(make(**changes), rows)
    model = model_of(task)
    labels = torch.tensor([row["labels"] for row in rows])
    labels = labels.double() if labels.is_floating_point() else labels
    whole = {"input_ids": padded(rows, "input_ids", 0), "labels": labels}
    own = model(**whole, attention_mask=padded(rows, "attention_mask", 0)).loss.item()
    assert loss_of(task, model, 3) == pytest.approx(own, rel=1e-10, abs=0)


def test_columns_that_the_model_does_not_take_are_left_out() -> None:
    rows = [row | {"label": 1, "text": "words", "idx": 3} for row in sentences(labels=False)]
    batch = classification_task(distilbert(), rows).collate(rows)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


@pytest.mark.parametrize("change", [{"n_head": 4}, {"activation_function": "relu"}])
def test_the_config_is_part_of_the_fingerprint(change: dict[str, Any]) -> None:
    """Neither changes a shape, so that nothing else would notice."""
    one, two = (language_model_task(c, blocks()) for c in (gpt2(), gpt2(**change)))
    same = language_model_task(gpt2(), blocks())
    assert source_hash(one, one.model()) == source_hash(same, same.model())
    assert source_hash(one, one.model()) != source_hash(two, two.model())


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no config\.json here or in a checkpoint below"):
        language_model_task(tmp_path, blocks())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TaskError, match=r"config\.json: .*model_type"):
        language_model_task(tmp_path, blocks())


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    usual = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    return TrainingArguments(out, **{**quiet, "save_strategy": "no", **usual, **changes})


def train(
    out: Path, *callbacks: TrainerCallback, resume: str | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """Train a GPT-2 of 2 layers with dropout and tied embeddings; its weights."""
    set_seed(7)
    trainer = Trainer(
        GPT2LMHeadModel(gpt2()),
        arguments(out, **changes),
        train_dataset=blocks(),
        eval_dataset=blocks(4),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_trainer_records_and_the_run_closes(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    saves = {"save_strategy": "steps", "save_steps": 1}
    weights = train(tmp_path / "out", RecorderCallback(tmp_path / "run"), **saves)
    assert all(torch.equal(weights[name], plain[name]) for name in plain)

    series, own = open_series(tmp_path / "run"), open_series(tmp_path / "out")
    assert series.steps == (0, 1, 2, 3, 4)
    assert own.steps == (1, 2, 3, 4)
    for step in own.steps:
        recorded, saved = series.read(step).tensors, own.read(step).tensors
        assert recorded.keys() == saved.keys()  # tied weights once, in both
        assert all(torch.equal(recorded[name], saved[name]) for name in saved)
    assert all(torch.equal(value, weights[n]) for n, value in series.read(4).tensors.items())
    set_seed(7)
    start = GPT2LMHeadModel(gpt2()).state_dict()
    assert all(torch.equal(value, start[n]) for n, value in series.read(0).tensors.items())

    task = language_model_task(tmp_path / "out", {"train": blocks()})
    before, after = series.read(3).tensors, series.read(4).tensors
    found = lcray.allocate(task, before, after, dtype="float64")["train"]
    model = task.model().double().eval()
    tokens = torch.stack([row["input_ids"] for row in blocks()])

    def loss(state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state, strict=False)
        logits = model(tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    change = loss(after) - loss(before)
    assert found.loss_change == pytest.approx(change, rel=1e-9)
    assert abs(found.gap) < 1e-4 * abs(change)


def test_accumulation_records_optimizer_steps_and_every_leaves_some_out(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 5}
    callback = RecorderCallback(tmp_path / "run", every=2)
    weights = train(tmp_path / "out", callback, **settings)
    series = open_series(tmp_path / "run")
    assert series.steps == (0, 2, 4, 5)
    last = series.read(5).tensors
    assert all(torch.equal(value, weights[name]) for name, value in last.items())


class StopAt(TrainerCallback):
    """Ends training in an evaluation, as early stopping does."""

    def __init__(self, step: int):
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_the_best_model_is_not_taken_for_the_last(tmp_path: Path) -> None:
    """The Trainer loads it before it says that training ended."""
    settings = {
        "load_best_model_at_end": True, "greater_is_better": True, "eval_strategy": "steps",
        "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 9,
    }  # fmt: skip
    callback = RecorderCallback(tmp_path / "run", every=5)
    weights = train(tmp_path / "out", callback, StopAt(3), **settings)
    series = open_series(tmp_path / "run")
    assert series.steps == (0, 3)
    last, own = series.read(3).tensors, load_file(tmp_path / "out/checkpoint-3/model.safetensors")
    assert all(torch.equal(value, own[name]) for name, value in last.items())
    assert any(not torch.equal(value, weights[name]) for name, value in last.items())


def test_a_model_that_was_changed_is_not_recorded_at_the_end(tmp_path: Path) -> None:
    """Where nothing has said that a step was the last before the best model is loaded."""
    args = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps"
    )
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback = RecorderCallback(tmp_path / "run", every=2)
    model = GPT2LMHeadModel(gpt2())
    callback.on_train_begin(args, state, control, model=model)
    callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    assert open_series(tmp_path / "run", minimum=1).steps == (0,)


def test_resuming_appends(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = RecorderCallback(tmp_path / "whole")
    weights = train(tmp_path / "out", whole, **saves, max_steps=4)
    first = RecorderCallback(tmp_path / "run")
    train(tmp_path / "again", first, **saves, max_steps=3)
    checkpoint = str(tmp_path / "again" / "checkpoint-2")
    with pytest.raises(RecorderError, match="later than start=2, up to step 3; pass overwrite"):
        train(tmp_path / "again", first, resume=checkpoint, **saves, max_steps=4)
    second = RecorderCallback(tmp_path / "run", overwrite=True)
    train(tmp_path / "again", second, resume=checkpoint, **saves, max_steps=4)
    one, two = open_series(tmp_path / "whole"), open_series(tmp_path / "run")
    assert one.steps == two.steps == (0, 1, 2, 3, 4)
    for step in one.steps:
        assert one.read(step).sha256 == two.read(step).sha256
    assert all(torch.equal(v, weights[n]) for n, v in two.read(4).tensors.items())
