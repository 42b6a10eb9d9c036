"""Train a small GPT-2 with a Trainer that records, and name the task: everything offline.

python hugging_face.py && lcray analyze trained/run --task hugging_face:task --out trained/out
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from lcray.integrations.transformers import RecorderCallback, language_model_task

TRAINED = Path("trained").resolve()  # the Trainer's output directory, and the run in it


def splits():
    """Tokenised samples, as for a Trainer; these are random."""
    tokens = torch.randint(50, (64, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return {"train": rows[:48], "val": rows[48:]}


def train():
    """Four steps of a Trainer, recorded."""
    set_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        TRAINED / "hf", max_steps=4, per_device_train_batch_size=16, learning_rate=1e-2,
        save_steps=1, logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=splits()["train"],
        callbacks=[RecorderCallback(TRAINED / "run")],
    )
    trainer.save_model(TRAINED / "hf" / "checkpoint-0")  # only if those are analyzed: see the docs
    trainer.train()


def task():
    """The task, once there is a config to read."""
    return language_model_task(TRAINED / "hf", splits)


if __name__ == "__main__":
    train()
