"""What the paper's networks share: scales, data, conditions, training and analysis that resume.

A *condition* is what sets a run apart: its optimizer, what is frozen, the last layer's momentum or
learning rate. Every run goes into a folder of its own, ``OUT/<network>/<condition>-<seed>``, with
its checkpoints in ``run`` and its analysis in ``out``. What is complete there is left as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lcray
from lcray import Recorder, Resources, Task
from lcray.errors import LcrayError, TaskError

MNIST, CIFAR10 = "mnist_10k.npz", "cifar10_12k.npz"
# Mean and standard deviation of the full training sets, per channel, of values scaled to [0, 1].
NORMALISATION = {
    MNIST: ([0.1307], [0.3081]),
    CIFAR10: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
Batch = tuple[Tensor, Tensor]  # images [n, C, H, W], classes [n]


@dataclass(frozen=True)
class Scale:
    """The sizes of data, training and repetitions.

    Attributes:
        train: images of the training split, all there are if fewer; likewise `val`.
        val: images of the validation split, the first of the file's test set.
        steps: optimizer steps, with one checkpoint per step.
        batch: images per mini-batch.
        seeds: of the conditions that are repeated.
        momenta: of the last layer, each for `momentum_seeds` seeds.
        momentum_seeds: likewise.
        adam: whether the network is trained with Adam as well.
        fisher: samples of a split that Fisher information takes; 0 for none.
        fisher_times: how often along the run, about.
    """

    train: int
    val: int
    steps: int
    batch: int
    seeds: int = 1
    momenta: tuple[float, ...] = ()
    momentum_seeds: int = 0
    adam: bool = True
    fisher: int = 0
    fisher_times: int = 5


@dataclass(frozen=True)
class Condition:
    """What sets runs apart.

    Attributes:
        name: of the condition.
        optimizer: ``sgd`` or ``adam``.
        frozen: ``first`` or ``last``, the module that keeps its initial value; None for none.
        last_momentum: of the last layer, where it is another than that of the rest.
        last_rate: factor of the last layer's learning rate.
    """

    name: str
    optimizer: str = "sgd"
    frozen: str | None = None
    last_momentum: float | None = None
    last_rate: float = 1.0


@dataclass(frozen=True)
class Network:
    """One of the paper's networks.

    Attributes:
        name: of its folder and its script.
        title: for people.
        model: builds it.
        data: the file of its images.
        scales: by name.
        rate: learning rate of SGD.
        adam_rate: of Adam.
        momentum: of SGD.
        paired: whether the conditions that are compared with the plain one are run as well.
        analysis: further options of `lcray.analyze`.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    data: str
    scales: Mapping[str, Scale]
    rate: float
    adam_rate: float = 1e-3
    momentum: float = 0.9
    paired: bool = False
    analysis: Mapping[str, Any] = field(default_factory=dict)

    def runs(self, scale: Scale) -> Iterator[tuple[Condition, int]]:
        """All conditions with their seeds: the plain ones first."""
        yield from ((PLAIN, seed) for seed in range(scale.seeds))
        if scale.adam:
            yield Condition("adam", "adam"), 0
        if self.paired:
            for condition in PAIRED:
                yield from ((condition, seed) for seed in range(scale.seeds))
            for momentum in scale.momenta:
                condition = Condition(f"momentum-{momentum:g}", last_momentum=momentum)
                yield from ((condition, seed) for seed in range(scale.momentum_seeds))


PLAIN = Condition("sgd")
PAIRED = (
    Condition("frozen-last", frozen="last"),
    Condition("frozen-first", frozen="first"),
    Condition("slow-last", last_rate=0.1),
)


def load(file: str, scale: Scale) -> dict[str, Batch]:
    """Splits ``train`` and ``val``, normalised, from the folder that ``LCRAY_DATA`` names."""
    folder = os.environ.get("LCRAY_DATA", "")
    path = Path(folder) / file
    if not folder or not path.is_file():
        raise TaskError(f"{path}: not found; set LCRAY_DATA (or --data) to the folder with it")
    mean, std = (torch.tensor(value)[:, None, None] for value in NORMALISATION[file])
    found = {}
    with np.load(path) as arrays:
        for split, part, n in (("train", "train", scale.train), ("val", "test", scale.val)):
            pixels = torch.from_numpy(arrays[f"x_{part}"][:n])
            pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
            classes = torch.from_numpy(arrays[f"y_{part}"][:n]).long().flatten()
            found[split] = (((pixels.float() / 255 - mean) / std).contiguous(), classes)
    return found


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every image, [n], in nats."""
    images, classes = batch
    return F.cross_entropy(model(images), classes, reduction="none")


def groups(batch: Batch) -> Tensor:
    """The class of every image, [n]."""
    return batch[1]


def sample_targets(output: Tensor, batch: Batch, generator: torch.Generator) -> Batch:
    """The images with classes drawn from the softmax of the logits."""
    drawn = torch.multinomial(output.softmax(1), 1, generator=generator)
    return batch[0], drawn[:, 0]


def task_of(network: Network, scale: str) -> Task:
    """The task of a network at a scale; each script has them under the scales' names."""
    return Task(
        model=network.model,
        splits=lambda: load(network.data, network.scales[scale]),
        loss=loss,
        groups=groups,
        sample_targets=sample_targets,
    )


def ends(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first and the last module with weights of their own."""
    owners = [m for m in model.modules() if "weight" in m._parameters]
    return owners[0], owners[-1]


def make_optimizer(
    network: Network, model: nn.Module, condition: Condition
) -> torch.optim.Optimizer:
    """The condition's optimizer; frozen parameters get no gradients and are left out."""
    first, last = ends(model)
    if condition.frozen is not None:
        (first if condition.frozen == "first" else last).requires_grad_(False)
    of_last = {id(parameter) for parameter in last.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = network.rate if condition.optimizer == "sgd" else network.adam_rate
    parts = [
        {"params": [p for p in trained if id(p) not in of_last]},
        {"params": [p for p in trained if id(p) in of_last], "lr": rate * condition.last_rate},
    ]
    parts = [part for part in parts if part["params"]]
    if condition.optimizer == "adam":
        return torch.optim.Adam(parts, lr=rate)
    if condition.last_momentum is not None:
        parts[-1]["momentum"] = condition.last_momentum
    return torch.optim.SGD(parts, lr=rate, momentum=network.momentum)


def minibatches(split: Batch, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Epochs over `split`, each newly shuffled."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for rows in torch.randperm(len(split[0]), generator=generator).split(size):
            if done == steps:
                return
            yield split[0][rows], split[1][rows]
            done += 1


def train(network: Network, scale: Scale, condition: Condition, seed: int, run: Path) -> None:
    """Record a run, unless it is there: it gets its name once it is complete.

    Runs of one seed have the same initial weights and mini-batches, whatever the condition.
    """
    if run.exists():
        return
    partial = run.with_name(run.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(seed)
    model = network.model().train()
    optimizer = make_optimizer(network, model, condition)
    data = load(network.data, scale)["train"]
    with Recorder(model, partial) as recorder:
        for batch in minibatches(data, scale.batch, scale.steps, seed):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
            recorder.step()
    partial.rename(run)


def analyze(
    network: Network, scale: str, run: Path, out: Path, resources: Resources, fisher: bool
) -> None:
    """Allocate a run, unless it is done; what was begun is resumed."""
    size = network.scales[scale]
    if complete(out, size):
        return
    options: dict[str, Any] = {"window": max(1, size.steps // 10), **network.analysis}
    if fisher and size.fisher:
        every = max(1, size.steps // size.fisher_times)
        options |= {"fisher": every, "fisher_samples": size.fisher}
    script = Path(__file__).with_name(f"{network.name}.py")
    lcray.analyze(run, f"{script}:{scale}", out, resources=resources, **options)


def complete(out: Path, scale: Scale) -> bool:
    """Whether an output has tables that reach the end of the run."""
    try:
        return lcray.open(out).plan.steps[-1] >= scale.steps
    except LcrayError:
        return False


def reproduce(network: Network, scale: str, folder: Path, resources: Resources) -> None:
    """Train and analyze every run of a network at a scale; what is complete is skipped."""
    plan = list(network.runs(network.scales[scale]))
    for number, (condition, seed) in enumerate(plan, 1):
        place = folder / network.name / f"{condition.name}-{seed}"
        if complete(place / "out", network.scales[scale]):
            continue
        place.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        train(network, network.scales[scale], condition, seed, place / "run")
        trained = time.perf_counter()
        fisher = seed == 0 and condition in (PLAIN, Condition("adam", "adam"))
        analyze(network, scale, place / "run", place / "out", resources, fisher)
        seconds = trained - start, time.perf_counter() - trained
        name = f"{network.name}/{place.name}"
        print(
            f"{number}/{len(plan)} {name}: trained {seconds[0]:.0f} s, analyzed {seconds[1]:.0f} s"
        )


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all scripts here take."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--scale", choices=("tiny", "small", "full"), default="small")
    parser.add_argument(
        "--out", type=Path, default=Path("paper"), help="folder of runs and outputs"
    )
    parser.add_argument("--data", help="folder of the data files (default: LCRAY_DATA)")
    parser.add_argument("--workers", type=int, help="of the analyses (default: one a CPU core)")
    parser.add_argument("--gpus-per-worker", type=float, help="GPUs each takes")
    parser.add_argument("--address", help="Ray cluster to use (default: a local one)")
    return parser


def settle(options: argparse.Namespace) -> tuple[Path, Resources]:
    """The folder of a scale and the resources of its analyses."""
    if options.data is not None:
        os.environ["LCRAY_DATA"] = options.data
    resources = Resources(
        workers=options.workers, gpus_per_worker=options.gpus_per_worker, address=options.address
    )
    return options.out.resolve() / options.scale, resources


def main(network: Network, description: str) -> None:
    """The command line of one network's script."""
    options = arguments(description).parse_args()
    reproduce(network, options.scale, *settle(options))
