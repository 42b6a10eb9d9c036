"""The examples and the demo's task: trained for real, and their losses recomputed from the files.

The twins below share nothing with the examples but the names of the tensors in a checkpoint: they
read the data themselves and compute every layer from its definition in float64.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
import torch.nn.functional as F
from repository import EXAMPLES, needs_data
from safetensors.torch import load_file

from lcray.errors import TaskError, UsageError
from lcray.tasks.task import Task, load_task

DATA = os.environ.get("LCRAY_DATA", "")
SAMPLES, STEPS = 32, 3

State = dict[str, torch.Tensor]


def train(name: str, run: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--run", str(run), *options]
    settings = {"LCRAY_SAMPLES": str(SAMPLES), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every example with seed 0; `again` and `other` are mnist_lenet with seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("examples")
    jobs = {name: (name, "0") for name in NAMES}
    jobs |= {"again": ("mnist_lenet", "0"), "other": ("mnist_lenet", "1")}

    def work(key: str) -> subprocess.CompletedProcess:
        name, seed = jobs[key]
        return train(name, folder / key, "--steps", str(STEPS), "--seed", seed)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(work, jobs):
            assert done.returncode == 0, done.stderr
    return {key: folder / key for key in jobs}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Task]]:
    """A function that loads an example's task as `lcray analyze` does."""
    monkeypatch.setenv("LCRAY_SAMPLES", str(SAMPLES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name: load_task(f"{EXAMPLES / name}.py:task")
    for name in ("data", *NAMES):
        sys.modules.pop(name, None)


def images(file: str, split: str, mean: list[float], std: list[float]) -> torch.Tensor:
    """The first images of a file, [SAMPLES, C, H, W] float64, normalised."""
    pixels = np.load(Path(DATA) / file)[f"x_{split}"][:SAMPLES].astype(np.float64) / 255
    pixels = pixels.reshape(*pixels.shape[:3], -1)
    return torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2))


def classes(file: str, split: str) -> torch.Tensor:
    return torch.from_numpy(np.load(Path(DATA) / file)[f"y_{split}"][:SAMPLES])


def linear(x: torch.Tensor, s: State, name: str) -> torch.Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return (logits.logsumexp(-1) - chosen).flatten()


def mnist(split: str) -> torch.Tensor:
    return images("mnist_10k.npz", split, [0.1307], [0.3081])


def fc_twin(s: State, split: str) -> torch.Tensor:
    x = mnist(split).flatten(1)
    x = linear(linear(x, s, "fc1").clamp(min=0), s, "fc2").clamp(min=0)
    return cross_entropy(linear(x, s, "fc3"), classes("mnist_10k.npz", split))


def lenet_twin(s: State, split: str) -> torch.Tensor:
    x = mnist(split)
    for name in ("conv1", "conv2"):
        x = F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"])
        n, c, h, w = x.shape
        x = x.clamp(min=0).reshape(n, c, h // 2, 2, w // 2, 2).amax(dim=(3, 5))
    x = linear(x.flatten(1), s, "fc1").clamp(min=0)
    return cross_entropy(linear(x, s, "fc2"), classes("mnist_10k.npz", split))


def batch_norm(x: torch.Tensor, s: State, name: str) -> torch.Tensor:
    mean, var, weight, bias = (
        s[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def resnet_twin(s: State, split: str) -> torch.Tensor:
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    x = images("cifar10_12k.npz", split, mean, std)
    x = batch_norm(F.conv2d(x, s["conv.weight"], padding=1), s, "bn").clamp(min=0)
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            at = f"stage{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            short = x[:, :, ::stride, ::stride]
            if stride == 2:  # zeros around the old channels: option A
                zeros = torch.zeros_like(short)[:, : short.shape[1] // 2]
                short = torch.cat((zeros, short, zeros), dim=1)
            x = F.conv2d(x, s[f"{at}.conv1.weight"], stride=stride, padding=1)
            x = batch_norm(x, s, f"{at}.bn1").clamp(min=0)
            x = F.conv2d(x, s[f"{at}.conv2.weight"], padding=1)
            x = (batch_norm(x, s, f"{at}.bn2") + short).clamp(min=0)
    return cross_entropy(linear(x.mean((2, 3)), s, "fc"), classes("cifar10_12k.npz", split))


def layer_norm(x: torch.Tensor, s: State, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def gpt_logits(s: State, ids: torch.Tensor) -> torch.Tensor:
    x = s["tokens.weight"][ids] + s["positions.weight"]
    future = torch.ones(64, 64, dtype=torch.bool).triu(1)
    for at in ("blocks.0", "blocks.1"):
        qkv = linear(layer_norm(x, s, f"{at}.ln1"), s, f"{at}.qkv")
        heads = []
        for h in range(0, 64, 16):
            q, k, v = (qkv[..., start + h : start + h + 16] for start in (0, 64, 128))
            scores = (q @ k.transpose(1, 2) / 4).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), s, f"{at}.proj")
        hidden = linear(layer_norm(x, s, f"{at}.ln2"), s, f"{at}.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, s, f"{at}.fc2")
    return layer_norm(x, s, "ln") @ s["tokens.weight"].T


TWINS = {"mnist_fc": fc_twin, "mnist_lenet": lenet_twin, "cifar_resnet20": resnet_twin}
NAMES = [*TWINS, "char_gpt"]


def state_at(run: Path, step: int) -> State:
    return load_file(run / f"step-{step:08d}.safetensors")


def task_losses(task: Task, state: State, split: str) -> torch.Tensor:
    """The task's losses per item at a recorded state, all in one batch."""
    model = task.model().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"head.weight"} and not unexpected  # the tied name of char_gpt
    data = task.splits()[split]
    with torch.no_grad():
        return task.loss(model, data)


def doubled(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_example_records_every_step(
    name: str, runs: dict[str, Path], example: Callable[[str], Task]
) -> None:
    run = runs[name]
    files = sorted(path.name for path in run.glob("*.safetensors"))
    assert files == [f"step-{step:08d}.safetensors" for step in range(STEPS + 1)]
    reference = json.loads((run / "run.json").read_text())["task"]
    assert load_task(reference) is example(name)
    states = [state_at(run, step) for step in range(STEPS + 1)]
    for before, after in pairwise(states):
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
        assert any(not before[key].equal(after[key]) for key in before)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", TWINS)
def test_losses_of_images_are_those_of_the_twin(
    name: str, runs: dict[str, Path], example: Callable[[str], Task]
) -> None:
    state, task = state_at(runs[name], STEPS), example(name)
    for split in ("train", "test"):
        expected = TWINS[name](doubled(state), split)
        measured = task_losses(task, state, split)
        assert measured.dtype == torch.float32
        torch.testing.assert_close(measured.double(), expected, rtol=1e-4, atol=1e-5)
        file = "cifar10_12k.npz" if "cifar" in name else "mnist_10k.npz"
        assert task.groups(task.splits()[split]).equal(classes(file, split))


def windows_of(inputs: torch.Tensor, targets: torch.Tensor, text: str) -> list[str]:
    """Each window as text with its next character, by the vocabulary of the text."""
    vocabulary = sorted(set(text))
    rows = torch.cat((inputs, targets[:, -1:]), dim=1).tolist()
    return ["".join(vocabulary[i] for i in row) for row in rows]


@pytest.mark.slow
@needs_data
def test_losses_of_characters_are_those_of_the_twin(
    runs: dict[str, Path], example: Callable[[str], Task]
) -> None:
    text = (Path(DATA) / "tinyshakespeare.txt").read_text()
    state, task = state_at(runs["char_gpt"], STEPS), example("char_gpt")
    border = len(text) * 9 // 10
    for split, part in (("train", text[:border]), ("val", text[border:])):
        ids, targets, _ = task.splits()[split]
        windows = windows_of(ids, targets, text)
        starts = [part.find(window) for window in windows]
        assert len(windows) == SAMPLES and min(starts) >= 0
        assert len(set(starts)) == SAMPLES and all(start % 64 == 0 for start in starts)
        assert ids[:, 1:].equal(targets[:, :-1])
        expected = cross_entropy(gpt_logits(doubled(state), ids), targets)
        measured = task_losses(task, state, split)
        assert measured.shape == (SAMPLES * 64,)
        torch.testing.assert_close(measured.double(), expected, rtol=1e-4, atol=1e-5)


@needs_data
def test_groups_of_characters_are_their_kinds(example: Callable[[str], Task]) -> None:
    text = (Path(DATA) / "tinyshakespeare.txt").read_text()
    task = example("char_gpt")
    batch = task.splits()["val"]
    targets = "".join(window[1:] for window in windows_of(*batch[:2], text))
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    expected = [0 if c in letters else 1 if c in " \n" else 2 for c in targets]
    labels = task.groups(batch)
    assert labels.tolist() == expected
    assert set(expected) == {0, 1, 2}
    per_window = labels.reshape(SAMPLES, 64)
    assert (per_window != per_window[:, :1]).any(dim=1).all()  # mixed within every sample


@pytest.mark.slow
@needs_data
def test_tied_embedding_is_stored_once(runs: dict[str, Path]) -> None:
    state = state_at(runs["char_gpt"], 0)
    assert [name for name, tensor in state.items() if tensor.shape == (65, 64)] == ["tokens.weight"]


def he_2016_parameters() -> int:
    """ResNet-20 from the paper: 1 + 6 convolutions a stage, BatchNorm's pair a channel, fc."""
    channels = [3, *[16] * 7, *[32] * 6, *[64] * 6]
    pairs = pairwise(channels)
    return sum(9 * i * o + 2 * o for i, o in pairs) + 64 * 10 + 10


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mnist_fc", 785 * 100 + 101 * 50 + 51 * 10),
        ("mnist_lenet", 26 * 20 + (20 * 25 + 1) * 40 + (640 + 1) * 400 + 401 * 10),
        ("cifar_resnet20", he_2016_parameters()),
        # embeddings; a block: two LayerNorms, qkv, projection, MLP; the last LayerNorm
        ("char_gpt", (65 + 64) * 64 + 2 * (256 + 65 * 256 + 65 * 256 + 257 * 64) + 128),
    ],
)
def test_parameter_count(name: str, count: int, example: Callable[[str], Task]) -> None:
    model = example(name).model()
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    if name == "cifar_resnet20":
        assert round(count / 1e6, 2) == 0.27  # He et al. 2016, table 6
        assert sum(p.ndim > 1 for p in model.parameters()) == 20


@pytest.mark.slow
@needs_data
def test_same_seed_same_run_other_seed_another(runs: dict[str, Path]) -> None:
    for step in range(STEPS + 1):
        first, again, other = (
            state_at(runs[key], step) for key in ("mnist_lenet", "again", "other")
        )
        assert all(first[name].equal(again[name]) for name in first)
        assert not any(first[name].equal(other[name]) for name in first)


def test_missing_data_is_one_line_that_names_the_variable(tmp_path: Path) -> None:
    done = train("mnist_fc", tmp_path / "run", LCRAY_DATA="")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "LCRAY_DATA" in last and "mnist_10k.npz" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_data_and_bad_sample_counts_are_task_errors(
    example: Callable[[str], Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = example("mnist_fc")
    monkeypatch.delenv("LCRAY_DATA", raising=False)
    with pytest.raises(TaskError, match="LCRAY_DATA"):
        task.splits()
    monkeypatch.setenv("LCRAY_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=r"mnist_10k\.npz does not exist: set LCRAY_DATA"):
        task.splits()
    arrays = {"x_train": np.zeros((3, 28, 28), np.uint8), "y_train": np.zeros(3, np.int64)}
    arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
    np.savez(tmp_path / "mnist_10k.npz", **arrays)
    assert len(task.splits()["train"][0]) == 3
    for bad in ("0", "-1", "few"):
        monkeypatch.setenv("LCRAY_SAMPLES", bad)
        with pytest.raises(TaskError, match=f"LCRAY_SAMPLES={bad}"):
            task.splits()


def test_minibatches_are_shuffled_epochs(example: Callable[[str], Task]) -> None:
    example("mnist_fc")
    rows = torch.arange(10)
    batches = sys.modules["data"].minibatches((rows, 2 * rows), size=4, steps=6, seed=0)
    drawn = list(batches)
    assert [len(first) for first, _ in drawn] == [4, 4, 2, 4, 4, 2]
    assert all(second.equal(2 * first) for first, second in drawn)
    epochs = torch.cat([first for first, _ in drawn]).reshape(2, 10)
    assert epochs.sort().values.equal(rows.expand(2, 10))
    assert not epochs[0].equal(epochs[1])


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="scikit-learn is missing: the demo needs lcray[demo]")
    from lcray.digits import train_demo

    run = tmp_path_factory.mktemp("demo") / "run"
    train_demo(run)
    return run


def demo_twin(s: State, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for name in ("conv1", "conv2"):
        x = F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], padding=1).clamp(min=0)
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax(dim=(3, 5))
    return cross_entropy(linear(linear(x.flatten(1), s, "fc1").clamp(min=0), s, "fc2"), y)


def test_demo_learns_the_digits(demo_run: Path) -> None:
    task = load_task("lcray.digits:task")
    assert len(list(demo_run.glob("step-*.safetensors"))) == 101
    for split, count in (("train", 1437), ("test", 360)):
        x, y = task.splits()[split]
        assert len(x) == len(y) == count
        means = []
        for step in (0, 100):
            state = state_at(demo_run, step)
            expected = demo_twin(doubled(state), x.double(), y)
            measured = task_losses(task, state, split)
            torch.testing.assert_close(measured.double(), expected, rtol=1e-4, atol=1e-5)
            means.append(expected.mean().item())
        assert abs(means[0] - math.log(10)) < 0.1  # an untrained network is close to uniform
        assert means[1] < 0.2


def test_demo_splits_are_the_digits_each_once() -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is missing: the demo needs lcray[demo]"
    )
    task = load_task("lcray.digits:task")
    pixels, labels = datasets.load_digits(return_X_y=True)
    expected = sorted((*row, label) for row, label in zip(pixels.tolist(), labels, strict=True))
    found = []
    for x, y in task.splits().values():
        assert task.groups((x, y)).equal(y) and set(y.tolist()) == set(range(10))
        raw = (x.double() * 0.376 + 0.305) * 16
        torch.testing.assert_close(raw, raw.round(), rtol=0, atol=1e-4)
        rows = raw.round().flatten(1).tolist()
        found += [(*row, label) for row, label in zip(rows, y.tolist(), strict=True)]
    assert sorted(found) == expected


def test_demo_training_is_seeded_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is missing: the demo needs lcray[demo]")
    from lcray.digits import train_demo

    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_demo(tmp_path / name, steps=2, seed=seed)
    assert torch.get_rng_state().equal(before)
    a, b, c = ((tmp_path / n / "step-00000002.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_demo_without_sklearn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match=r"lcray\[demo\]"):
        load_task("lcray.digits:task").splits()


@pytest.mark.slow
def test_rescaling_changes_the_fisher_information_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import fisher_rescaling

    with pytest.MonkeyPatch.context() as patch:
        scenes.work_inline(patch)
        found = fisher_rescaling.compare(tmp_path, steps=5)
    assert found["factor"].nunique() == 3
    for _, row in found.iterrows():
        # To the rounding of checkpoints in float32: factors are powers of two, so there is none.
        assert row["ratio of lc"] == pytest.approx(1.0, rel=1e-8)
        for kind in ("true", "empirical"):
            assert row[f"ratio of trace_{kind}"] == pytest.approx(row["factor"] ** -2, rel=1e-8)
