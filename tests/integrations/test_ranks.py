"""Two processes that train together, over gloo on loopback: what is recorded, and by whom."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch
import torch.nn.functional as F
from repository import PACKAGE, TESTS

from lcray.checkpoints import open_series

WORKER = TESTS / "integrations" / "ranks_worker.py"
#: Runs a script and ends at once: threads of gloo that meet an interpreter in its last steps abort
#: the process (pytorch/pytorch#179291), or wait for ever where DDP is the last to hold the group.
RUN = """
import os, runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(script: Path, *arguments: object, cwd: Path | None = None) -> None:
    """Run a script on two processes; both must end well within two minutes."""
    port = str(free_port())
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = str(PACKAGE.parent)
    command = [sys.executable, "-c", RUN, str(script), *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n---\n".join(outputs)


def single() -> list[dict[str, torch.Tensor]]:
    """One process, the same global batches, in halves where batch statistics are taken."""
    model = ranks_worker.build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    for x, y in ranks_worker.batches():
        optimizer.zero_grad()
        for half in (slice(4, 8), slice(0, 4)):  # the statistics that stay are those of rank 0
            before = {name: value.clone() for name, value in model.norm.named_buffers()}
            (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
            if half.start:
                model.norm.load_state_dict(before, strict=False)
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["ddp", "ddp-compiled", "fully_shard", "fsdp1"])
def test_rank_0_records_the_whole_model(tmp_path: Path, scene: str) -> None:
    launch(WORKER, scene, tmp_path)
    assert not (tmp_path / "rank-1").exists() and not (tmp_path / "every-1").exists()
    series = open_series(tmp_path / "rank-0")
    assert series.steps == (0, 1, 2, 3, 4)
    assert open_series(tmp_path / "every-0").steps == (0, 3, 4)
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    names = ranks_worker.build().state_dict().keys() - {"second.weight"}  # tied: stored once
    for step, (state, alone) in enumerate(zip(states, single(), strict=True)):
        recorded = series.read(step).tensors
        assert recorded.keys() == names
        for name, value in recorded.items():
            own = state.get(name, state.get(f"module.{name}"))
            assert torch.equal(value, own), f"{name} of step {step}"
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)
    described = json.loads((tmp_path / "rank-0" / "run.json").read_text())
    assert described["aliases"] == {"second.weight": "first.weight"}
    kinds = {
        layer["name"]: (layer["kind"], layer["requires_grad"]) for layer in described["layers"]
    }
    assert kinds["first.weight"] == ("parameter", True)
    assert kinds["last.bias"] == ("parameter", False)
    assert kinds["norm.running_mean"][0] == "buffer"
    assert described["ended"] and described["last_step"] == 4


@pytest.mark.slow
def test_lightning_on_two_processes(tmp_path: Path) -> None:
    launch(WORKER, "lightning", tmp_path)
    assert not (tmp_path / "rank-1").exists()
    series = open_series(tmp_path / "rank-0")
    assert series.steps == (0, 1, 2, 3, 4)
    state = torch.load(tmp_path / "states.pt", weights_only=True)
    assert all(torch.equal(value, state[n]) for n, value in series.read(4).tensors.items())


@pytest.mark.slow
def test_hidden_parameters_are_refused_on_both_ranks(tmp_path: Path) -> None:
    launch(WORKER, "refused", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_rank_waits_for_one_that_could_not_begin(tmp_path: Path) -> None:
    launch(WORKER, "blocked", tmp_path)
    assert "format_version" in (tmp_path / "error-0").read_text()
    assert "could not begin on rank 0" in (tmp_path / "error-1").read_text()


@pytest.mark.slow
def test_ranks_agree_on_the_step_that_training_resumes_from(tmp_path: Path) -> None:
    launch(WORKER, "resumed", tmp_path)
    assert [(tmp_path / f"start-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert [(tmp_path / f"end-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert open_series(tmp_path / "run").steps == (0, 1, 2, 3, 4)


@pytest.mark.slow
def test_every_rank_may_write_a_run_of_its_own(tmp_path: Path) -> None:
    launch(WORKER, "every_rank", tmp_path)
    assert [open_series(tmp_path / f"rank-{rank}").steps for rank in (0, 1)] == [(0, 1)] * 2
