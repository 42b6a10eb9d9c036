"""The common parts of the examples: data, mini-batches and command line.

The three data files lie in one folder, named by the environment variable ``LCRAY_DATA`` or by a
script's ``--data``. ``LCRAY_SAMPLES`` caps the samples of every split; unset, a split is whole.
Both are read when the data is loaded. `lcray analyze` must see the values that training saw.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcray.errors import TaskError

MNIST = "mnist_10k.npz"  # x_train uint8 [8000, 28, 28], y_train int64 [8000]; 2,000 for testing
CIFAR10 = "cifar10_12k.npz"  # x_train uint8 [10000, 32, 32, 3], y_train [10000]; 2,000 for testing
SHAKESPEARE = "tinyshakespeare.txt"  # 1.1 million characters

# Mean and standard deviation of the full training sets, per channel, of values scaled to [0, 1].
NORMALISATION = {
    MNIST: ([0.1307], [0.3081]),
    CIFAR10: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}


def arguments(description: str, *, run: str, needs: str) -> argparse.Namespace:
    """The command line of a training script; exits with one line where the data is missing."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path(run), help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--data", help="folder of the data files (default: LCRAY_DATA)")
    options = parser.parse_args()
    if options.data is not None:
        os.environ["LCRAY_DATA"] = options.data
    try:
        locate(needs)
    except TaskError as error:
        parser.error(str(error))
    return options


def locate(file: str) -> Path:
    """The path of a data file; a `TaskError` says what to set where there is none."""
    folder = os.environ.get("LCRAY_DATA", "")
    if not folder:
        raise TaskError(f"no folder to read {file} from: set LCRAY_DATA (or --data) to it")
    path = Path(folder) / file
    if not path.is_file():
        raise TaskError(f"{path} does not exist: set LCRAY_DATA (or --data) to the folder with it")
    return path


def samples(available: int) -> int:
    """The number of samples of a split to take: all of them, or at most ``LCRAY_SAMPLES``."""
    text = os.environ.get("LCRAY_SAMPLES", "") or str(available)
    if not text.isdecimal() or int(text) == 0:
        raise TaskError(
            f"LCRAY_SAMPLES={text}: set it to a positive number of samples, or unset it"
        )
    return min(int(text), available)


def load_images(file: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Splits ``train`` and ``test``: normalised images [N, C, H, W] float32, classes [N] int64."""
    mean, std = (torch.tensor(value)[:, None, None] for value in NORMALISATION[file])
    splits = {}
    with np.load(locate(file)) as arrays:
        for split in ("train", "test"):
            classes = torch.from_numpy(arrays[f"y_{split}"]).long().flatten()
            n = samples(len(classes))
            pixels = torch.from_numpy(arrays[f"x_{split}"][:n])
            pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
            images = ((pixels.float() / 255 - mean) / std).contiguous()
            splits[split] = (images, classes[:n])
    return splits


def load_text(file: str) -> tuple[Tensor, str]:
    """A text as ids [length] int64, and its vocabulary: id i stands for the i-th character."""
    text = locate(file).read_text(encoding="utf-8")
    vocabulary = "".join(sorted(set(text)))
    ids = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([ids[character] for character in text]), vocabulary


def minibatches(
    split: tuple[Tensor, ...], *, size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `steps` mini-batches of `size` samples: epochs over `split`, each newly shuffled."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for rows in torch.randperm(len(split[0]), generator=generator).split(size):
            if done == steps:
                return
            yield tuple(tensor[rows] for tensor in split)
            done += 1
