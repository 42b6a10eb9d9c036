"""`lcray convert`: what others saved, made into a run; and that nothing is unpickled unasked."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from attacks import Payload
from torch import Tensor, nn

import lcray
from lcray.checkpoints import open_series
from lcray.checkpoints.convert import convert
from lcray.cli import app
from lcray.errors import CheckpointError, LcrayError, RecorderError, UsageError

# That there is one process only is what is wanted; and importing the library.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning",
    "ignore::DeprecationWarning:torch.*",
)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def state(seed: int, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in net(seed).state_dict().items()}


def tied(seed: int, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value for name, value in net(seed).state_dict().items()}


def expect(run: Path, seeds: dict[int, int], left_out: tuple[str, ...] = ()) -> None:
    series = open_series(run, minimum=1)
    assert series.steps == tuple(seeds)
    for step, seed in seeds.items():
        stored, wanted = series.read(step).tensors, state(seed)
        assert stored.keys() == wanted.keys() - {*left_out}
        assert all(torch.equal(stored[name], wanted[name]) for name in stored)
        assert all(stored[name].dtype == wanted[name].dtype for name in stored)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Three files, whose order by name is not that by number."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for step in (0, 9, 10):
        torch.save(tied(step), folder / f"net-{step}.pt")
    torch.save({"state": {}}, folder / "optimizer-10.pt")
    (folder / "log.txt").write_text("no checkpoint")
    return folder


def test_files_of_torch_save(saved: Path, tmp_path: Path) -> None:
    found = lcray.convert(saved, tmp_path / "run")
    assert (found.steps, found.written) == ((0, 9, 10), 3)
    assert "2.weight" not in found.layers
    expect(tmp_path / "run", {0: 0, 9: 9, 10: 10}, ("2.weight",))
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["aliases"] == {"2.weight": "0.weight"}
    assert described["ended"] and described["last_step"] == 10
    kinds = {layer["name"]: layer["kind"] for layer in described["layers"]}
    assert kinds["1.running_mean"] == kinds["1.num_batches_tracked"] == "buffer"
    assert kinds["1.weight"] == kinds["0.bias"] == "parameter"
    assert lcray.inspect(tmp_path / "run").ok


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda s: s, {}),
        (lambda s: {"state_dict": s, "epoch": 3}, {}),
        (lambda s: {"model": s, "optimizer": {"state": {}}}, {}),
        (lambda s: {"weights": s, "ema": s}, {"key": "ema"}),
        (lambda s: OrderedDict((f"module.{n}", v) for n, v in s.items()), {}),
        (lambda s: {f"_orig_mod.{n}": v for n, v in s.items()}, {}),
        (lambda s: {"net.a": torch.ones(1)} | {f"model.{n}": v for n, v in s.items()},
         {"strip_prefix": "model."}),
    ],
)  # fmt: skip
def test_where_the_model_is(wrap: Callable[..., Any], options: dict, tmp_path: Path) -> None:
    torch.save(wrap(state(4)), tmp_path / "step_4.pt")
    lcray.convert(tmp_path / "step_4.pt", tmp_path / "run", **options)
    expect(tmp_path / "run", {4: 4})


@pytest.mark.parametrize("name", ["global_step", "step", "iteration"])
def test_the_files_own_step_wins_over_its_name(name: str, tmp_path: Path) -> None:
    torch.save({"model": state(1), name: 700}, tmp_path / "epoch-2.pt")
    assert lcray.convert(tmp_path / "epoch-2.pt", tmp_path / "run").steps == (700,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_step_may_be_a_tensor_beside_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({"model": state(1), "step": torch.tensor(70, dtype=dtype)}, tmp_path / "epoch-2.pt")
    assert lcray.convert(tmp_path / "epoch-2.pt", tmp_path / "run").steps == (70,)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(70.0),
        torch.tensor([70]),
        torch.tensor(True),
        torch.tensor(70, device="meta"),
        torch.tensor(70).to_sparse(),
    ],
    ids=["float", "vector", "flag", "meta", "sparse"],
)
def test_other_tensors_are_no_steps(value: Tensor, tmp_path: Path) -> None:
    torch.save({"model": state(1), "step": value}, tmp_path / "epoch-2.pt")
    assert lcray.convert(tmp_path / "epoch-2.pt", tmp_path / "run").steps == (2,)


def test_a_tensor_of_the_model_is_no_step(tmp_path: Path) -> None:
    torch.save(state(1) | {"step": torch.tensor(70)}, tmp_path / "epoch-2.pt")
    found = lcray.convert(tmp_path / "epoch-2.pt", tmp_path / "run")
    assert found.steps == (2,) and "step" in found.layers


def test_folders_of_a_step(tmp_path: Path) -> None:
    for step in (5, 10):
        folder = tmp_path / "hf" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.save(state(step), folder / "pytorch_model.bin")
        torch.save({}, folder / "optimizer.pt")
    lcray.convert(tmp_path / "hf", tmp_path / "run")
    expect(tmp_path / "run", {5: 5, 10: 10})


@pytest.mark.slow  # importing it
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*many workers")
def test_lightnings_own_checkpoints(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = net(3)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    saving = lightning.callbacks.ModelCheckpoint(
        tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, save_last=True
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[saving], **quiet,
        log_every_n_steps=1,
    )  # fmt: skip
    module = Net()
    data = torch.utils.data.TensorDataset(torch.randn(12, 3))
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert len(list((tmp_path / "saved").iterdir())) == 4  # "last" is the third once more
    found = lcray.convert(tmp_path / "saved", tmp_path / "run", strip_prefix="model.")
    assert found.steps == (1, 2, 3)
    stored = open_series(tmp_path / "run").read(3).tensors
    assert all(
        torch.equal(stored[n], v) for n, v in module.model.state_dict().items() if n[0] < "2"
    )


def save_distributed(folder: Path, seed: int) -> None:
    content = {"model": state(seed), "optim": {"lr": 0.1, "momentum": torch.ones(3)}}
    dcp.save(content, checkpoint_id=folder, no_dist=True)


def test_distributed_checkpoints_need_trust(tmp_path: Path) -> None:
    for step in (2, 4):
        save_distributed(tmp_path / "saved" / f"step-{step}", step)
    with pytest.raises(CheckpointError, match=r"\.metadata is a pickle.*pass --trust-pickle"):
        lcray.convert(tmp_path / "saved", tmp_path / "run", strip_prefix="model.")
    assert not (tmp_path / "run").exists()
    trusted = {"strip_prefix": "model.", "trust_pickle": True}
    lcray.convert(tmp_path / "saved", tmp_path / "run", **trusted)
    expect(tmp_path / "run", {2: 2, 4: 4})
    lcray.convert(tmp_path / "saved" / "step-4", tmp_path / "one", **trusted)
    expect(tmp_path / "one", {4: 4})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "beside", "inside"])
def test_nothing_is_unpickled_without_trust(tmp_path: Path, zipped: bool, place: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "step-1.pt"
    content: Any = Payload(mark)
    if place == "beside":
        content = {"state_dict": state(1), "extra": content}
    elif place == "inside":
        content = state(1) | {"extra": content}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than tensors.*any code.*pass --trust-pickle"):
        lcray.convert(path, tmp_path / "run")
    assert not mark.exists() and not (tmp_path / "run").exists()
    if place != "whole":  # and it was a pickle that would have run
        lcray.convert(path, tmp_path / "run", trust_pickle=True)
        assert mark.exists()
        expect(tmp_path / "run", {1: 1})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("trust", [False, True])
def test_torchscript_is_refused_with_what_to_do(trust: bool, tmp_path: Path) -> None:
    path = tmp_path / "step-1.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(
        CheckpointError, match=r"is a TorchScript archive.*torch\.jit\.load"
    ) as caught:
        lcray.convert(path, tmp_path / "run", trust_pickle=trust)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_tar_files_are_refused_with_what_to_do(trust: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "step-1.pt"
    with tarfile.open(path, "w:") as archive:  # as torch wrote up to 0.1.10
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(Payload(mark))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(CheckpointError, match=r"is a tar file.*weights_only=False") as caught:
        lcray.convert(path, tmp_path / "run", trust_pickle=trust)
    assert "\n" not in str(caught.value)
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_a_distributed_index_is_not_unpickled_without_trust(tmp_path: Path) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "step-1"
    save_distributed(folder, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match="is a pickle"):
        lcray.convert(folder, tmp_path / "run")
    assert not mark.exists()
    with pytest.raises(CheckpointError, match="cannot be read"):
        lcray.convert(folder, tmp_path / "run", trust_pickle=True)
    assert mark.exists()


def test_it_goes_on_where_it_stopped_and_overwrites_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original, calls = tmp_path / "run", convert.read_source, []

    def interrupted(source: Any, **options: Any) -> Any:
        calls.append(source.path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(source, **options)

    monkeypatch.setattr(convert, "read_source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lcray.convert(saved, run)
    monkeypatch.undo()
    assert not json.loads((run / "run.json").read_text())["ended"]
    files = {path: path.stat().st_mtime_ns for path in run.glob("*.safetensors")}
    assert len(files) == 2
    assert lcray.convert(saved, run).written == 1
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert lcray.convert(saved, run).written == 0
    expect(run, {0: 0, 9: 9, 10: 10}, ("2.weight",))

    torch.save(tied(8), saved / "net-9.pt")  # another model in the place of one that was converted
    with pytest.raises(CheckpointError, match="are both step 9, and differ"):
        lcray.convert(saved, run)
    expect(run, {0: 0, 9: 9, 10: 10}, ("2.weight",))


def test_what_was_converted_stays_in_the_run_though_its_source_is_gone(
    saved: Path, tmp_path: Path
) -> None:
    lcray.convert(saved, tmp_path / "run")
    for step in (0, 10):
        (saved / f"net-{step}.pt").unlink()
    torch.save(tied(8), saved / "net-8.pt")
    assert lcray.convert(saved, tmp_path / "run").steps == (8, 9)
    expect(tmp_path / "run", {0: 0, 8: 8, 9: 9, 10: 10}, ("2.weight",))
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (said["sessions"][0]["start"], said["last_step"], said["every"]) == (0, 10, 1)


@pytest.mark.parametrize("good", [0, 1], ids=["damaged", "good and damaged"])
def test_a_run_that_had_ended_keeps_its_end(good: int, saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lcray.convert(saved, run)
    before = (run / "run.json").read_bytes()
    if good:
        torch.save(tied(11), saved / "net-11.pt")
    (saved / "net-12.pt").write_bytes(b"torn")
    # Sources are read by name: net-9.pt, which is known, comes last and is not reached.
    with pytest.raises(CheckpointError, match=r"net-12\.pt: cannot be read"):
        lcray.convert(saved, run)
    said = json.loads((run / "run.json").read_text())
    assert (said["ended"], said["last_step"]) == (True, 11 if good else 10)
    expect(run, {0: 0, 9: 9, 10: 10} | ({11: 11} if good else {}), ("2.weight",))
    if not good:
        assert (run / "run.json").read_bytes() == before


def test_a_run_has_not_ended_while_checkpoints_are_added(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original, ended = tmp_path / "run", convert.read_source, []

    def looking(source: Any, **options: Any) -> Any:
        ended.append(json.loads((run / "run.json").read_text())["ended"])
        return original(source, **options)

    lcray.convert(saved, run)
    torch.save(tied(11), saved / "net-11.pt")
    monkeypatch.setattr(convert, "read_source", looking)
    lcray.convert(saved, run)
    assert ended == [True, True, True, False]  # after net-0, net-10 and net-11; before net-9
    assert json.loads((run / "run.json").read_text())["last_step"] == 11


def test_runs_of_others_are_left_alone(saved: Path, tmp_path: Path) -> None:
    lcray.Recorder(net(0), tmp_path / "recorded").close()
    with pytest.raises(RecorderError, match="holds a run from another source"):
        lcray.convert(saved, tmp_path / "recorded")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(RecorderError, match=": not empty"):
        lcray.convert(saved, tmp_path / "full")
    with pytest.raises(UsageError, match="is the source itself"):
        lcray.convert(saved, saved)
    with pytest.raises(UsageError, match="written to a local path"):
        lcray.convert(saved, "s3://bucket/run")


def test_the_same_step_twice(saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "net-9.pt", saved / "net-009.pt")
    assert lcray.convert(saved, tmp_path / "run").steps == (0, 9, 10)  # they are equal
    torch.save(tied(1), saved / "net-009.pt")
    with pytest.raises(CheckpointError, match=r"net-9\.pt: and .*net-009\.pt are both step 9"):
        lcray.convert(saved, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "name", "why"),
    [
        (torch.ones(2), "step-1.pt", "holds a Tensor, not tensors by name"),
        ({"a": {"x": torch.ones(1)}, "b": 1}, "step-1.pt", "with --key, one of: a"),
        ({"w": torch.ones(1)}, "net.pt", "neither its content nor its name holds a step"),
        ({1: torch.ones(1)}, "step-1.pt", "names that are not text"),
        ({"w": torch.ones(1)}, "step-1.txt", "no checkpoint of torch.save"),
        ({"w": torch.eye(2).to_sparse()}, "step-1.pt", r"step-1\.pt: .*safetensors cannot hold"),
        ({"w": torch.ones(1), "__metadata__": torch.ones(1)}, "step-1.pt", "called '__metadata__'"),
        ({"w\udcff": torch.ones(1)}, "step-1.pt", "save it under another name"),
        ({"model": {"w": torch.ones(1)}, "step": -5}, "step-1.pt", "claims to be step -5"),
        ({"model": {"w": torch.ones(1)}, "step": 2**63}, "step-1.pt", "steps are 0 to 2"),
        ({"state_dict": {"epoch": 3}}, "step-1.pt", "no tensors under ''"),
    ],
)
def test_what_cannot_be_converted(content: Any, name: str, why: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(LcrayError, match=why) as caught:
        lcray.convert(tmp_path / name, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_flag_is_no_step(tmp_path: Path) -> None:
    torch.save({"model": state(7), "step": True, "iteration": 7}, tmp_path / "net-3.pt")
    assert lcray.convert(tmp_path / "net-3.pt", tmp_path / "run").steps == (7,)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "folder", "absent", "nothing"])
def test_damaged_files(damage: str, saved: Path, tmp_path: Path) -> None:
    path = saved / "net-9.pt"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 8)
    elif damage == "absent":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    where = tmp_path if damage == "nothing" else path
    with pytest.raises(CheckpointError) as caught:
        lcray.convert(where, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_models_of_different_form(saved: Path, tmp_path: Path) -> None:
    torch.save({**tied(9), "0.bias": torch.ones(4)}, saved / "net-9.pt")
    with pytest.raises(
        CheckpointError, match=r"net-9\.pt: tensor '0\.bias' differs from the first"
    ):
        lcray.convert(saved, tmp_path / "run")
    torch.save({"0.weight": torch.ones(3, 3)}, saved / "net-9.pt")
    with pytest.raises(CheckpointError, match=r"net-9\.pt: tensor .* is missing"):
        lcray.convert(saved, tmp_path / "run")


def test_the_command(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["lcray", "convert", *map(str, words)])
        code: Any = 0
        try:
            app.main()
        except SystemExit as error:
            code = error.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    done = run(saved, tmp_path / "run")
    assert done.code == 0
    assert "3 checkpoints, steps 0 to 10, 8 tensors each; 3 written now" in done.out
    done = run(saved, tmp_path / "run", "--json")
    assert json.loads(done.out)["written"] == 0
    torch.save(Payload(tmp_path / "executed"), saved / "net-11.pt")
    done = run(saved, tmp_path / "run")
    assert done.code == 1
    assert done.err.startswith("lcray: ") and done.err.count("\n") == 1
    assert not (tmp_path / "executed").exists()
