"""The paper's networks, conditions and page; trained, analyzed and told end to end when slow."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import planting
import pytest
import scenes
import torch
from repository import EXAMPLES, needs_data

PAPER = EXAMPLES / "paper"
MODULES = ("common", "fc", "lenet", "allcnn", "resnet20", "vgg", "everything", "claims", "page")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setattr(sys, "path", [str(PAPER), *sys.path])
    import common
    import everything

    yield SimpleNamespace(common=common, networks=everything.NETWORKS)
    for name in MODULES:
        sys.modules.pop(name, None)


def test_networks_are_those_of_the_paper(paper: SimpleNamespace) -> None:
    counts = {n.name: sum(p.numel() for p in n.model().parameters()) for n in paper.networks}
    conv = [(3, 96, 3), (96, 96, 3), (96, 96, 3), (96, 192, 3), (192, 192, 3), (192, 192, 3)]
    conv += [(192, 192, 3), (192, 192, 1), (192, 10, 1)]
    halved = [(3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    blocks = [(16, 16)] * 3 + [(16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
    assert counts == {
        "fc": 785 * 100 + 101 * 50 + 51 * 10,
        "lenet": 26 * 20 + (500 + 1) * 40 + 641 * 400 + 401 * 10,
        "allcnn": sum((a * k * k + 1) * b for a, b, k in conv),
        "resnet20": 27 * 16 + 32 + sum(9 * a * b + 9 * b * b + 4 * b for a, b in blocks) + 65 * 10,
        "vgg": sum((9 * a + 1) * b for a, b in halved) + 1025 * 512 + 513 * 512 + 513 * 10,
    }
    for network in paper.networks:
        shape = (2, 1, 28, 28) if network.data == paper.common.MNIST else (2, 3, 32, 32)
        assert network.model().eval()(torch.zeros(shape)).shape == (2, 10)
        assert set(network.scales) == {"tiny", "small", "full"}


def test_conditions_set_apart_what_they_say(paper: SimpleNamespace) -> None:
    common, network = paper.common, paper.networks[0]

    def groups(**options: object) -> tuple[torch.nn.Module, list[dict]]:
        torch.manual_seed(0)
        model = network.model()
        made = common.make_optimizer(network, model, common.Condition("x", **options))
        return model, made.param_groups

    model, (rest, last) = groups()
    assert last["params"] == list(model.fc3.parameters())
    assert (rest["lr"], last["lr"], last["momentum"]) == (0.05, 0.05, 0.9)
    _, (rest, last) = groups(last_rate=0.1)
    assert (rest["lr"], last["lr"]) == (0.05, pytest.approx(0.005))
    _, (rest, last) = groups(last_momentum=0.0)
    assert (rest["momentum"], last["momentum"]) == (0.9, 0.0)
    model, (rest,) = groups(frozen="last")
    assert not any(p.requires_grad for p in model.fc3.parameters()) and len(rest["params"]) == 4
    model, _ = groups(frozen="first")
    assert not any(p.requires_grad for p in model.fc1.parameters())


def test_six_seeds_and_every_paired_condition_at_small_scale(paper: SimpleNamespace) -> None:
    fc = paper.networks[0]
    runs = [(condition.name, seed) for condition, seed in fc.runs(fc.scales["small"])]
    assert len(runs) == len(set(runs))
    for name in ("sgd", "frozen-last", "frozen-first", "slow-last"):
        assert [seed for condition, seed in runs if condition == name] == list(range(6))
    assert ("momentum-0", 0) in runs and ("momentum-0.99", 0) in runs and ("adam", 0) in runs


def planted(folder: Path, lc: np.ndarray, error: float | None = None) -> None:
    """An analyzed run whose layer `fc3.weight` has this LC [T, n]; `fc1.weight` has none."""
    layers = {"fc1.weight": np.zeros_like(lc), "fc3.weight": lc}
    values = {("train", name): part for name, part in layers.items()}
    planting.from_elements(folder / "out", values, window=len(lc), error=error)


def test_pairs_are_of_the_same_seed(paper: SimpleNamespace, tmp_path: Path) -> None:
    """A run that is missing shifts no pair."""
    import claims

    for condition, seed in itertools.product(("sgd", "frozen-first"), (0, 1, 2, 10)):
        if (condition, seed) != ("frozen-first", 1):
            lc = 100.0 * seed + (condition == "frozen-first") * (1 + 0.01 * seed)
            planted(tmp_path / f"{condition}-{seed}", np.full((4, 1), lc / 4))
    study = claims.Study(paper.networks[0], tmp_path)
    found = claims._difference(study, "frozen-first").set_index("layer")["lc"]
    assert found["fc3.weight"] == pytest.approx(1 + 0.01 * (0 + 2 + 10) / 3, rel=1e-9)


@pytest.mark.parametrize(("shape", "verdict"), [(0.5, "agrees"), (2.0, "disagrees")])
def test_tails_agree_or_disagree(
    paper: SimpleNamespace, tmp_path: Path, shape: float, verdict: str
) -> None:
    import claims

    random = np.random.default_rng(0)
    lc = random.weibull(shape, (10, 400)) * random.choice([-1.0, 1.0], (10, 400))
    planted(tmp_path / "sgd-0", lc)
    ((_, found),) = claims._tails(claims.Study(paper.networks[0], tmp_path))
    assert found == verdict


def test_tails_of_another_distribution_disagree(paper: SimpleNamespace, tmp_path: Path) -> None:
    """Lognormal LC, whose Weibull fits have k < 1 and are not the best."""
    import claims

    random = np.random.default_rng(0)
    lc = random.lognormal(sigma=2.0, size=(10, 400)) * random.choice([-1.0, 1.0], (10, 400))
    planted(tmp_path / "sgd-0", lc)
    ((text, found),) = claims._tails(claims.Study(paper.networks[0], tmp_path))
    assert found == "disagrees" and "best by AIC in 0 of 2" in text


@pytest.mark.parametrize(
    ("mean", "verdict"), [(0.3, "agrees"), (-0.3, "disagrees"), (0, "undecided")]
)
def test_layers_hurt_over_seeds(
    paper: SimpleNamespace, tmp_path: Path, mean: float, verdict: str
) -> None:
    """Six seeds, of which the first says the opposite: their mean and spread decide."""
    import claims

    for seed, off in enumerate((-0.4 if mean > 0 else 0.4, 0.1, -0.1, 0.05, -0.05, 0.0)):
        planted(tmp_path / f"sgd-{seed}", np.full((4, 1), (mean + off) / 4))
    (vgg,) = (network for network in paper.networks if network.name == "vgg")
    (text, found), _ = claims._hurting(claims.Study(vgg, tmp_path))
    assert found == verdict and "over 6 seeds" in text


@pytest.mark.parametrize(
    ("total", "error", "verdict"),
    [
        (0.5, 0.004, "agrees"),  # 100 intervals: a bound of 0.4
        (0.5, 0.006, "undecided"),
        (-0.5, 0.004, "disagrees"),
        (0.5, None, "undecided"),
    ],
)
def test_layers_of_one_run_hurt_beyond_their_bound(
    paper: SimpleNamespace, tmp_path: Path, total: float, error: float | None, verdict: str
) -> None:
    """However its intervals swing: they are what they are."""
    import claims

    swing = np.tile([1.0, -1.0], 50)[:, None] + total / 100
    planted(tmp_path / "sgd-0", swing, error)
    (vgg,) = (network for network in paper.networks if network.name == "vgg")
    (text, found), _ = claims._hurting(claims.Study(vgg, tmp_path))
    assert found == verdict
    bound = "(no bound)" if error is None else f"± {100 * error:.4f}"
    assert text == f"fc3.weight: {total:+.4f} {bound} in one run"


def test_momenta_of_one_run_each_decide_nothing(paper: SimpleNamespace, tmp_path: Path) -> None:
    import claims

    for name, lc in (("sgd-0", 0.5), ("momentum-0-0", -0.5), ("momentum-0-1", -0.4)):
        planted(tmp_path / name, np.full((4, 1), lc / 4), 1e-6)
    ((text, found),) = claims._momentum(claims.Study(paper.networks[0], tmp_path))
    assert found == "undecided"
    assert "0: -0.4500 (" in text and "over 2 seeds; 0.9: +0.5000 (+0.5000 to +0.5000)" in text


@pytest.mark.slow
@needs_data
def test_end_to_end_and_again(
    paper: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every network at the tiny scale, in this process; what is complete is left as it is."""
    from lcray.execution.cluster.resources import Resources

    scenes.work_inline(monkeypatch)
    for network in paper.networks:
        paper.common.reproduce(network, "tiny", tmp_path, Resources())
    expected = {
        f"{network.name}/{condition.name}-{seed}"
        for network in paper.networks
        for condition, seed in network.runs(network.scales["tiny"])
    }
    done = {str(path.parents[2].relative_to(tmp_path)) for path in _manifests(tmp_path)}
    assert done == expected
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "fc" / "sgd-0" / "run.partial").mkdir()  # cut off while it trained again
    for network in paper.networks:
        paper.common.reproduce(network, "tiny", tmp_path, Resources())
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before

    from page import VERDICTS, make_page

    text = make_page(tmp_path, "tiny", paper.networks)
    rows = [line for line in text.splitlines() if line.endswith(tuple(f"{v} |" for v in VERDICTS))]
    assert len(rows) >= 15
    for network in paper.networks:
        assert any(row.startswith(f"| {network.title} |") for row in rows)
    first = paper.networks[0]  # said again alone; all five would take minutes
    again = make_page(tmp_path, "tiny", [first]).splitlines()
    assert [row for row in rows if row.startswith(f"| {first.title} |")] == [
        row for row in again if row.endswith(tuple(f"{v} |" for v in VERDICTS))
    ]


def _manifests(folder: Path) -> Iterator[Path]:
    return folder.glob("*/*/out/tables/manifest.json")


@needs_data
def test_a_run_that_was_cut_off_is_trained_anew(paper: SimpleNamespace, tmp_path: Path) -> None:
    common, network = paper.common, paper.networks[0]
    scale, run = network.scales["tiny"], tmp_path / "run"
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "step-00000000.safetensors").write_bytes(b"torn")
    common.train(network, scale, common.PLAIN, 0, run)
    assert len(list(run.glob("step-*.safetensors"))) == scale.steps + 1
    first = {path.name: path.read_bytes() for path in run.glob("step-*")}
    common.train(network, scale, common.PLAIN, 0, tmp_path / "again")
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "again").glob("step-*")}
    frozen = common.Condition("frozen-last", frozen="last")
    common.train(network, scale, frozen, 0, tmp_path / "frozen")
    from safetensors.torch import load_file

    start, end = (load_file(tmp_path / "frozen" / f"step-{n:08d}.safetensors") for n in (0, 12))
    assert torch.equal(start["fc3.weight"], end["fc3.weight"])
    assert not torch.equal(start["fc2.weight"], end["fc2.weight"])
    assert torch.equal(
        start["fc1.weight"], load_file(run / "step-00000000.safetensors")["fc1.weight"]
    )


def test_without_data_it_says_what_to_set(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LCRAY_DATA"}
    command = [sys.executable, str(PAPER / "vgg.py"), "--scale", "tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "set LCRAY_DATA (or --data)" in done.stderr.splitlines()[-1]
