"""The plan's estimate of the disk against what outputs take: LeNet, a vision transformer, a GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcray
from lcray.checkpoints import Recorder
from lcray.planning.costs import estimate
from lcray.planning.plan import Span
from lcray.tasks.task import Task

CLOSE = 0.12  # of what the output takes
STEPS = 24


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 40, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(640, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    size = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**shape, **size, num_attention_heads=4, **off))


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 16, "vocab_size": 65}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **off, bos_token_id=0, eos_token_id=0))


def images(n: int) -> tuple[Tensor, Tensor]:
    """Blobs whose place is their class: something to learn."""
    random = torch.Generator().manual_seed(n)
    classes = torch.arange(n) % 10
    x = 0.3 * torch.randn(n, 1, 28, 28, generator=random)
    for i, k in enumerate(classes.tolist()):
        x[i, :, 4 + 2 * k : 8 + 2 * k, 4 : 24 - k] += 1
    return x, classes


def tokens(n: int) -> tuple[Tensor, Tensor]:
    """Sequences that count on, by steps that differ."""
    start = torch.arange(n)[:, None] * 7
    text = (start + torch.arange(17) * (1 + torch.arange(n)[:, None] % 3)) % 65
    return text[:, :-1], text[:, 1:]


def loss(model: nn.Module, batch: Any) -> Tensor:
    found = model(batch[0])
    logits = getattr(found, "logits", found)
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), reduction="none")


def test_rows_of_single_parameters_are_in_every_span(plain_out: Path) -> None:
    """Shards have sums of every parameter for each span: more spans take more disk."""
    plan = lcray.open(plain_out).plan
    found = estimate(plan, 1)
    pieces = tuple(Span(pair) for pair in pairwise(plan.steps))
    assert len(pieces) > len(plan.spans)
    bigger = estimate(replace(plan, spans=pieces), 1)
    assert found.rows == bigger.rows
    assert bigger.disk_bytes > found.disk_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "data", "grouped"), [(lenet, images, True), (vit, images, False), (gpt, tokens, False)]
)
def test_an_output_takes_what_the_plan_says(
    make: Callable[[], nn.Module],
    data: Callable[[int], tuple[Tensor, Tensor]],
    grouped: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers", reason="transformers is missing: a ViT and a GPT need it")
    torch.manual_seed(0)
    model, splits = make(), {"train": data(60), "val": data(30)}
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    if grouped:
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with Recorder(model, tmp_path / "run") as recorder:
        for _ in range(STEPS):
            rows = torch.randint(0, 60, (20,))
            batch = tuple(part[rows] for part in splits["train"])
            optimizer.zero_grad()
            loss(model.train(), batch).mean().backward()
            optimizer.step()
            recorder.step()
    task = Task(make, splits, loss, groups=(lambda batch: batch[1]) if grouped else None)
    scenes.work_inline(monkeypatch)
    lcray.analyze(tmp_path / "run", task, tmp_path / "out")
    taken = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    found = estimate(lcray.open(tmp_path / "out").plan, 1)
    assert found.disk_bytes == pytest.approx(taken, rel=CLOSE)
