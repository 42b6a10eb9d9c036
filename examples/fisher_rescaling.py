"""One function, two sets of weights: the same loss change allocation, another Fisher information.

Run:  python examples/fisher_rescaling.py

A ReLU layer is multiplied by 2 and the next one by 1/2, which leaves the network's function, and
so every loss, as it was. LC, a product of movement and gradient, is the same for every parameter.
The Fisher information of a layer is divided by the square of its factor: it measures how the
function is written down as well. (Lan et al. 2019 give this as a reason to prefer LC.)
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import lcray
from lcray import Recorder, Resources, digits

STEPS, FACTORS = 20, {"fc1.weight": 2.0, "fc1.bias": 2.0, "fc2.weight": 0.5}


def sample_targets(output: Tensor, batch: digits.Batch, generator: torch.Generator) -> digits.Batch:
    """The images with classes drawn from the softmax of the logits."""
    drawn = torch.multinomial(output.softmax(1), 1, generator=generator)
    return batch[0], drawn[:, 0]


task = replace(digits.task, sample_targets=sample_targets)


def rescale(run: Path, out: Path) -> None:
    """Record the same run with the factors applied to every checkpoint."""
    from safetensors.torch import load_file

    model = digits.DigitNet()
    states = [load_file(path) for path in sorted(run.glob("step-*.safetensors"))]
    for step, state in enumerate(states):
        scaled = {name: FACTORS.get(name, 1.0) * value for name, value in state.items()}
        model.load_state_dict(scaled)
        if step == 0:
            recorder = Recorder(model, out)
        else:
            recorder.step()
    recorder.close()


def measure(run: Path, out: Path) -> pd.DataFrame:
    """LC over the run and the mean Fisher trace, by layer, of the training split."""
    results = lcray.analyze(
        run,
        task,
        out,
        resources=Resources(workers=1),
        splits="train",
        fisher=5,
        dtype="float64",
        batch_size=512,
        memory_format="contiguous",
    )
    lc = results.layers().groupby("layer", observed=True)["lc"].sum()
    traces = results.fisher().groupby("layer", observed=True)[["trace_true", "trace_empirical"]]
    return pd.concat([lc, traces.mean()], axis=1)


def compare(folder: Path, steps: int = STEPS) -> pd.DataFrame:
    """Both runs side by side, and what each quantity is multiplied by."""
    digits.train_demo(folder / "run", steps=steps)
    rescale(folder / "run", folder / "scaled")
    one = measure(folder / "run", folder / "out")
    two = measure(folder / "scaled", folder / "out-scaled")
    ratios = (two / one).add_prefix("ratio of ")
    factors = pd.Series({name: FACTORS.get(name, 1.0) for name in one.index}, name="factor")
    return pd.concat([factors, one, ratios], axis=1)


def main() -> None:
    """Print the comparison."""
    with tempfile.TemporaryDirectory() as folder:
        print(compare(Path(folder)).round(4).to_string())


if __name__ == "__main__":
    main()
