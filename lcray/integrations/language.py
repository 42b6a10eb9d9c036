"""Tasks for Transformers' language models and text classifiers, built offline from a config.

Legend: B samples per batch, S positions, V entries of the vocabulary, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcray.checkpoints import naming
from lcray.errors import TaskError
from lcray.integrations.extras import missing
from lcray.tasks.task import Data, Task

try:
    import transformers
    from transformers import PretrainedConfig
except ImportError as error:
    raise missing(__name__, "transformers") from error

#: The label of positions without a loss, as everywhere in Transformers.
IGNORED = -100
COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

Splits = Callable[[], Mapping[str, Data]] | Mapping[str, Data] | Data


def language_model_task(
    source: str | Path | PretrainedConfig,
    data: Splits,
    *,
    masked: bool = False,
    columns: Sequence[str] = COLUMNS,
    collate: Callable[[list[Any]], Any] | None = None,
    attention: str | None = None,
) -> Task:
    """The task of a causal (or masked) language model: cross-entropy per token.

    The items are all positions of all samples. Positions with label -100 have weight 0, so every
    token counts exactly once, and the loss of a split is the mean over its tokens. This is what the
    Trainer minimises, without dropout and label smoothing. LC and losses are in nats.

    Args:
        source: a directory that contains `config.json` (a model's directory, or a Trainer's output
            with its ``checkpoint-N``), or the config itself. Nothing is downloaded: weights come
            from the run.
        data: tokenised samples by split, a function that loads them, or one data set, which is
            then the split ``train``. A sample is a dict of lists or tensors: `input_ids` [S], and
            optionally `attention_mask`, the other `columns`, and `labels` [S]. A causal model's
            labels are not shifted; without labels, they are the tokens with attention.
        masked: predict each labelled position itself, as BERT does. Mask the data beforehand: masks
            that are drawn again at every read are refused.
        columns: names of the fields that go to the model, if a sample has them; other fields are
            left out.
        collate: makes a batch (a dict) of a list of samples. By default, samples are padded on the
            right, with the config's `pad_token_id`, attention 0 and label -100.
        attention: as `attn_implementation` of Transformers.

    Raises:
        TaskError: there is no config, or it builds no such model.
    """
    config = _config(source)
    kind = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    return Task(
        model=partial(_build, kind, _as_text(config), attention),
        splits=_splits(data),
        loss=partial(_token_loss, masked),
        collate=collate or partial(_pad, tuple(columns), _padding(config), not masked, False),
    )


def classification_task(
    source: str | Path | PretrainedConfig,
    data: Splits,
    *,
    columns: Sequence[str] = COLUMNS,
    collate: Callable[[list[Any]], Any] | None = None,
    attention: str | None = None,
) -> Task:
    """The task of a text classifier: one loss per sample, according to its config's `problem_type`.

    The loss is cross-entropy (label -100: weight 0), squared error (regression), or binary
    cross-entropy over several labels; the last two are means over the labels of a sample. Without a
    `problem_type`, one output means regression, integer labels mean classes, and other labels mean
    several labels per sample. Groups are the classes if `problem_type` says that there are any (the
    Trainer's own configs do).

    Args:
        source: as for `language_model_task`.
        data: as for `language_model_task`, where `labels` (or `label`) is one number per sample, or
            a list of C.
        columns: as for `language_model_task`.
        collate: as for `language_model_task`.
        attention: as for `language_model_task`.

    Raises:
        TaskError: there is no config, or it builds no such model.
    """
    config = _config(source)
    problem = config.problem_type or ("regression" if config.num_labels == 1 else None)
    return Task(
        model=partial(_build, "AutoModelForSequenceClassification", _as_text(config), attention),
        splits=_splits(data),
        loss=partial(_sample_loss, problem),
        groups=_classes if problem == "single_label_classification" else None,
        collate=collate or partial(_pad, tuple(columns), _padding(config), False, True),
    )


def _splits(data: Splits) -> Callable[[], Mapping[str, Data]] | Mapping[str, Data]:
    if callable(data) or isinstance(data, Mapping):
        return data
    return {"train": data}


def _config(source: str | Path | PretrainedConfig) -> PretrainedConfig:
    if isinstance(source, PretrainedConfig):
        return source
    folder = Path(source)
    if not (folder / "config.json").is_file():
        below = [path.parent for path in folder.glob("*/config.json")]
        numbered = [(naming.parse_step(path.name), path) for path in below]
        known = [(step, path) for step, path in numbered if step is not None]
        if not known:
            raise TaskError(f"{folder}: no config.json here or in a checkpoint below")
        folder = max(known)[1]
    try:
        found: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # any fault that the library finds
        text = " ".join(str(error).split())[:300]
        raise TaskError(f"{folder / 'config.json'}: {text}") from error
    return found


def _as_text(config: PretrainedConfig) -> str:
    """The config as JSON: text, so that it is part of the task's fingerprint."""
    values = config.to_dict()
    values.pop("transformers_version", None)
    return json.dumps({"model_type": config.model_type, **values}, sort_keys=True, default=str)


def _build(kind: str, text: str, attention: str | None) -> nn.Module:
    """A model with random weights, in float32, that returns its outputs only."""
    values = json.loads(text)
    values.update(use_cache=False, dtype=None)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model: nn.Module = getattr(transformers, kind).from_config(config, **chosen)
    return model


def _padding(config: PretrainedConfig) -> int:
    return getattr(config, "pad_token_id", None) or 0


def _pad(
    columns: tuple[str, ...],
    padding: int,
    own_labels: bool,
    by_sample: bool,
    samples: list[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """A batch of samples, padded on the right: each column [B, S], labels [B, S] or [B, …]."""
    first = samples[0]
    fill = {name: padding if name == "input_ids" else 0 for name in columns if name in first}
    batch = {name: _rows([sample[name] for sample in samples], fill[name]) for name in fill}
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    seen = torch.arange(int(lengths.max())) < lengths[:, None]
    if "attention_mask" in columns:
        batch.setdefault("attention_mask", seen.long())
    name = "labels" if "labels" in first or "label" not in first else "label"
    if name in first and by_sample:
        batch["labels"] = torch.stack([torch.as_tensor(sample[name]) for sample in samples])
    elif name in first:
        batch["labels"] = _rows([sample[name] for sample in samples], IGNORED)
    elif own_labels:
        counts = batch.get("attention_mask", seen) != 0
        batch["labels"] = batch["input_ids"].masked_fill(~counts, IGNORED)
    else:
        raise KeyError("a sample has no 'labels'")
    return batch


def _rows(rows: Sequence[Any], value: int) -> Tensor:
    tensors = [torch.as_tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**given).logits
    return logits


def _token_loss(
    masked: bool, model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Losses and weights of all positions, [B·S] or [B·(S-1)], sample by sample."""
    logits, labels = _outputs(model, batch), batch["labels"]
    if not masked:  # position i predicts token i + 1
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _cross_entropy(logits.flatten(0, 1), labels.flatten())


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return losses, (labels != IGNORED).to(losses.dtype)


def _sample_loss(
    problem: str | None, model: nn.Module, batch: Mapping[str, Tensor]
) -> Tensor | tuple[Tensor, Tensor]:
    """Losses of the samples, [B], and weights if a class may be missing."""
    logits, labels = _outputs(model, batch), batch["labels"]
    if problem is None:
        several = labels.is_floating_point()
        problem = "multi_label_classification" if several else "single_label_classification"
    if problem == "single_label_classification":
        return _cross_entropy(logits, labels.flatten())
    wanted = labels.to(logits.dtype).reshape(logits.shape)
    if problem == "regression":
        return (logits - wanted).square().mean(1)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def _classes(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["labels"].flatten()
