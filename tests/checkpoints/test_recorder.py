"""The recorder: what it writes, that it does not disturb training, and that no fault is silent."""

import copy
import errno
import importlib.metadata
import json
import os
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch
from disks import small_disk
from safetensors.torch import load_file
from torch import nn

from lcray.checkpoints import Recorder, open_series, writer
from lcray.checkpoints.bits import same_bits
from lcray.checkpoints.recording import Slot
from lcray.errors import OutputError, RecorderError, UsageError
from lcray.storage import sync_folder
from lcray.storage.files import write_json_atomic


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def update(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    y = torch.randint(3, (16,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def clones(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name].contiguous(), b[name].contiguous()), name


def stored(directory):
    """Step to tensors, through the reference loader rather than our own."""
    return {
        int(path.stem.removeprefix("step-")): load_file(path)
        for path in directory.glob("step-*.safetensors")
    }


# What is written


def test_one_file_a_step_with_the_state_of_that_moment(tmp_path):
    model = net()
    optimizer = sgd(model)
    expected = {0: clones(model)}
    with Recorder(model, tmp_path / "run") as rec:
        for step in range(1, 8):
            update(model, optimizer, step)
            rec.step()
            expected[step] = clones(model)
    found = stored(tmp_path / "run")
    assert found.keys() == expected.keys()
    for step in expected:
        assert_same(found[step], expected[step])
    assert not same_bits(found[0]["0.weight"], found[7]["0.weight"])
    series = open_series(tmp_path / "run")
    assert_same(series.read(7).tensors, expected[7])
    assert sorted(p.name for p in (tmp_path / "run").iterdir())[:2] == [
        "run.json",
        "step-00000000.safetensors",
    ]


def test_run_json(tmp_path):
    model = net()
    model[0].bias.requires_grad_(False)
    with Recorder(model, tmp_path, every=2, task="pkg.mod:task", metadata={"lr": 0.1}) as rec:
        content = json.loads((tmp_path / "run.json").read_text())
        assert content["ended"] is False
        rec.step()
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["format_version"] == 1
    assert (content["ended"], content["last_step"], content["every"]) == (True, 1, 2)
    assert (content["task"], content["metadata"]) == ("pkg.mod:task", {"lr": 0.1})
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert layers["0.bias"] == {
        "name": "0.bias",
        "shape": [8],
        "dtype": "float32",
        "kind": "parameter",
        "requires_grad": False,
    }
    assert layers["1.num_batches_tracked"]["kind"] == "buffer"
    assert layers["1.num_batches_tracked"]["dtype"] == "int64"
    assert layers.keys() == model.state_dict().keys()
    assert content["sessions"][0]["versions"]["torch"] == str(torch.__version__)


def test_run_json_from_a_source_tree(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    Recorder(net(), tmp_path).close()
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["sessions"][0]["versions"]["lcray"] == "unknown"


class Odd(nn.Module):
    """Tied, transposed, low-precision, scalar, empty and flat-buffer tensors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        flat = torch.arange(10.0)
        self.left = nn.Parameter(flat[:6])
        self.right = nn.Parameter(flat[4:])
        self.f16 = nn.Parameter(torch.randn(3).half())
        self.bf16 = nn.Parameter(torch.randn(3).bfloat16())
        self.spin = nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]))
        self.register_buffer("conjugate", torch.tensor([1 + 2j, 3 - 4j]).conj())
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("flag", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_odd_tensors_keep_values_and_dtypes(tmp_path):
    model = Odd()
    Recorder(model, tmp_path).close()
    found = stored(tmp_path)[0]
    expected = clones(model)
    del expected["head.weight"]
    assert "scratch" not in expected
    expected["conjugate"] = torch.tensor([1 - 2j, 3 + 4j])
    assert_same(found, expected)
    assert found["f16"].dtype == torch.float16 and found["bf16"].dtype == torch.bfloat16
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["aliases"] == {"head.weight": "embed.weight"}
    named = [name for name, _ in model.named_parameters()]
    assert [layer["name"] for layer in content["layers"]][: len(named)] == named
    tensors = open_series(tmp_path, minimum=1).read(0).tensors
    assert list(tensors)[: len(named)] == named  # the model's order, in the file as well


def test_trainable_only_leaves_out_frozen_parameters(tmp_path):
    model = net()
    model[0].requires_grad_(False)
    Recorder(model, tmp_path, trainable_only=True).close()
    assert stored(tmp_path)[0].keys() == model.state_dict().keys() - {"0.weight", "0.bias"}
    with pytest.raises(RecorderError, match="trainable_only=False"):
        Recorder(nn.Linear(1, 1).requires_grad_(False), tmp_path / "b", trainable_only=True)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # importing the compiler
@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        torch.compile,
        lambda m: Wrapper(torch.compile(m)),
        lambda m: torch.compile(Wrapper(m)),
    ],
)
def test_wrapper_prefixes_are_not_stored(tmp_path, wrap):
    model = net()
    Recorder(wrap(model), tmp_path).close()
    assert_same(stored(tmp_path)[0], clones(model))


def test_a_submodule_called_module_survives_the_round_trip(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    model["other"].requires_grad_(False)
    Recorder(model, tmp_path, trainable_only=True).close()
    # Only "module." names are in the file, and the reader must not take it for a wrapper.
    tensors = open_series(tmp_path, minimum=1).read(0).tensors
    assert tensors.keys() == {"module.weight", "module.bias"}


def test_real_data_parallel_wrapper(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        model = net()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(parallel)
        with Recorder(parallel, tmp_path / "run") as rec:
            update(parallel, optimizer, 1)
            rec.step()
        assert_same(stored(tmp_path / "run")[1], clones(model))
    finally:
        torch.distributed.destroy_process_group()


class Sharded(torch.Tensor):
    """Stands for tensor subclasses whose local data is not the whole tensor."""


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.ReLU(), "nothing to record"),
        (nn.ParameterList([torch.ones(2).as_subclass(Sharded)]), "is a Sharded"),
        (nn.ParameterList([torch.eye(2).to_sparse()]), "sparse_coo, .* cannot hold"),
        (nn.LazyLinear(3), "not initialised"),
        (nn.Linear(2, 2, device="meta"), "meta device"),
        (nn.Linear(2, 2, dtype=torch.complex128), "safetensors cannot hold"),
    ],
)
def test_models_that_cannot_be_recorded(tmp_path, model, why):
    with pytest.raises(RecorderError, match=why):
        Recorder(model, tmp_path)


# Neutrality


def train(directory, steps=12):
    model = net()
    optimizer = sgd(model)
    rec = Recorder(model, directory, optimizer=optimizer) if directory else None
    for step in range(1, steps + 1):
        update(model, optimizer, step)
    if rec:
        rec.close()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    momentum = {str(i): s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()}
    return clones(model), gradients, momentum, torch.get_rng_state(), model.training


def test_training_is_bit_identical_with_and_without(tmp_path):
    plain, recorded = train(None), train(tmp_path)
    for a, b in zip(plain[:3], recorded[:3], strict=True):
        assert_same(a, b)
    assert torch.equal(plain[3], recorded[3])  # dropout drew the same numbers
    assert plain[4] == recorded[4]
    assert len(stored(tmp_path)) == 13


# Steps


def test_every_k_and_the_optimizer_hook(tmp_path):
    model = net()
    optimizer = sgd(model)
    rec = Recorder(model, tmp_path, optimizer=optimizer, every=3)
    for step in range(1, 8):
        update(model, optimizer, step)
    assert rec.last_step == 7
    rec.close()
    assert sorted(stored(tmp_path)) == [0, 3, 6, 7]  # the last one is not lost
    update(model, optimizer, 8)  # the hook is gone: no error, no file
    assert sorted(stored(tmp_path)) == [0, 3, 6, 7]  # the last one is not lost


def test_accumulation_records_optimizer_steps(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    with Recorder(model, tmp_path, optimizer=optimizer):
        for batch in range(6):
            model(torch.ones(4, 2)).sum().backward()
            if batch % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    assert sorted(stored(tmp_path)) == [0, 1, 2]


@pytest.mark.parametrize("mode", ["manual", "hook and step", "fused hook"])
def test_a_step_that_the_scaler_skips_is_a_step_without_movement(tmp_path, mode):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=mode == "fused hook")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    hooked = None if mode == "manual" else optimizer
    with Recorder(model, tmp_path, optimizer=hooked) as rec:
        for iteration in (1, 2, 3):
            loss = model(torch.ones(4, 2)).sum() * (float("inf") if iteration == 2 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if mode != "fused hook":
                rec.step()
    found = stored(tmp_path)
    assert sorted(found) == [0, 1, 2, 3]
    assert_same(found[1], found[2])
    for a, b in ((0, 1), (2, 3)):
        # d(sum over 4 samples)/dw = 4, lr 0.1
        assert torch.allclose(found[b]["weight"], found[a]["weight"] - 0.4, atol=1e-6)


def test_the_hook_alone_counts_updates_that_happened(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Recorder(model, tmp_path, optimizer=optimizer):
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(4, 2)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert sorted(stored(tmp_path)) == [0, 1, 2]


# Resuming


def test_resuming_appends_as_if_nothing_had_happened(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for directory, cut in ((straight, None), (broken, 4)):
        model = net()
        optimizer = sgd(model)
        rec = Recorder(model, directory)
        for step in range(1, 9):
            update(model, optimizer, step)
            rec.step()
            if step == cut:
                rec.close()
                random = torch.get_rng_state()
                states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = net(seed=1)
                optimizer = sgd(model)
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
                torch.set_rng_state(random)
                before = (directory / "step-00000004.safetensors").stat().st_mtime_ns
                rec = Recorder(model, directory)
                assert rec.last_step == 4
                after = (directory / "step-00000004.safetensors").stat().st_mtime_ns
                assert before == after  # equal, so not written again
        rec.close()
    names = sorted(path.name for path in straight.glob("step-*"))
    assert names == sorted(path.name for path in broken.glob("step-*"))
    for name in names:
        assert (straight / name).read_bytes() == (broken / name).read_bytes()
    sessions = json.loads((broken / "run.json").read_text())["sessions"]
    assert [session["start"] for session in sessions] == [0, 4]


@pytest.fixture
def five(tmp_path):
    """A run of steps 0 to 5 of one model, whose state then is that of step 5."""
    model = net()
    optimizer = sgd(model)
    with Recorder(model, tmp_path) as rec:
        for step in range(1, 6):
            update(model, optimizer, step)
            rec.step()
    return tmp_path, model


def load(model, directory, step):
    model.load_state_dict(load_file(directory / f"step-{step:08d}.safetensors"))


def test_resuming_from_another_state_is_refused(five):
    directory, model = five
    with torch.no_grad():
        model[4].bias[1] = torch.nextafter(model[4].bias[1], torch.tensor(9.0))
    with pytest.raises(RecorderError, match=r"step-00000005.* differs .*'4.bias' and 0 more"):
        Recorder(model, directory)
    load(model, directory, 5)
    Recorder(model, directory).close()  # the refusal left no lock behind


def test_resuming_from_an_earlier_step_needs_overwrite(five):
    directory, model = five
    before = {p.name: p.read_bytes() for p in directory.glob("step-*")}
    with pytest.raises(RecorderError, match="later than start=3, up to step 5"):
        Recorder(model, directory, start=3)
    with pytest.raises(RecorderError, match=r"step-00000003.* differs"):
        Recorder(model, directory, start=3, overwrite=True)
    assert {p.name: p.read_bytes() for p in directory.glob("step-*")} == before
    load(model, directory, 3)
    with Recorder(model, directory, start=3, overwrite=True) as rec:
        assert sorted(stored(directory)) == [0, 1, 2, 3]
        rec.step()
    assert sorted(stored(directory)) == [0, 1, 2, 3, 4]


def test_resuming_beyond_the_last_file_writes_that_state(five):
    directory, model = five
    with torch.no_grad():
        model[4].bias.add_(1.0)
    Recorder(model, directory, start=9).close()
    assert sorted(stored(directory)) == [0, 1, 2, 3, 4, 5, 9]
    assert_same(stored(directory)[9], clones(model))


def test_a_fresh_run_may_start_anywhere(tmp_path):
    with Recorder(net(), tmp_path, start=100) as rec:
        rec.step()
    assert sorted(stored(tmp_path)) == [100, 101]


def test_overwrite_removes_only_what_a_recorder_wrote(five):
    directory, model = five
    os.rename(directory / "step-00000005.safetensors", directory / "mine_5.safetensors")
    load(model, directory, 4)
    with pytest.raises(RecorderError, match="not written by a recorder"):
        Recorder(model, directory, start=4, overwrite=True)
    assert (directory / "mine_5.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Linear(6, 8), "'weight' is absent in the run and float32"),
        (net().double(), r"'0.weight' is float32 \[8, 6\] in the run and float64"),
        (net()[:4], "'4.weight' is float32 .* and absent"),
    ],
)
def test_another_model_is_refused(five, model, why):
    with pytest.raises(RecorderError, match=why):
        Recorder(model, five[0])


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "cannot be read"), ('{"format_version": 9}', "is 9"), ("[]", "None"),
     ('{"format_version": 1}', "no list of layers")],
)  # fmt: skip
def test_a_bad_run_json_is_refused(five, text, why):
    (five[0] / "run.json").write_text(text)
    with pytest.raises(RecorderError, match=why):
        Recorder(five[1], five[0])


def test_a_torn_last_file_is_named(five):
    path = five[0] / "step-00000005.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecorderError, match=r"step 5, .*cannot be read"):
        Recorder(five[1], five[0])


# Faults


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def step_until_error(rec, model, limit=200):
    for _ in range(limit):
        with torch.no_grad():
            model.weight.add_(1.0)
        rec.step()
        time.sleep(0.001)
    raise AssertionError(f"no error in {limit} steps")


def test_a_full_disk_raises_in_the_training_loop_and_leaves_no_torn_file(disk):
    model = nn.Linear(64, 64)  # 16 KiB a file
    rec = Recorder(model, disk / "run")
    with pytest.raises(RecorderError, match="could not be written: No space left"):
        step_until_error(rec, model)
    for again in (rec.step, rec.step, rec.close):
        with pytest.raises(RecorderError, match="No space left"):
            again()
    steps = open_series(disk / "run").steps
    assert steps == tuple(range(len(steps)))  # a prefix, without a hole
    assert len(steps) > 3
    load_file(disk / "run" / f"step-{steps[-1]:08d}.safetensors")
    assert not list((disk / "run").glob(".*"))
    with pytest.raises(RecorderError, match=r"cannot be written: No space left"):
        Recorder(nn.Linear(512, 512), disk / "other")  # at construction


def python(code, *arguments, check=True):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    )


def test_a_file_size_limit_is_an_error_too(tmp_path):
    code = """
import resource, sys, time, torch
from lcray.checkpoints import Recorder
from lcray.errors import RecorderError
model = torch.nn.Linear(64, 64)
rec = Recorder(model, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    for _ in range(200):
        rec.step(); time.sleep(0.001)
except RecorderError as error:
    print(error)
"""
    assert (
        "step 1 could not be written: File too large" in python(code, tmp_path, check=False).stdout
    )
    assert sorted(stored(tmp_path)) == [0]
    assert not list(tmp_path.glob(".*"))


def test_a_dead_writer_raises_at_the_next_step(tmp_path, monkeypatch):
    model = net()
    monkeypatch.setattr(writer.BackgroundWriter, "_run", lambda self: None)  # ends at once
    rec = Recorder(model, tmp_path)
    rec._session.writer._thread.join()
    for _ in range(2):
        with pytest.raises(RecorderError, match="writer thread is gone"):
            rec.step()


def test_a_failed_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    rec = Recorder(net(), tmp_path)

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lcray.checkpoints.directory.os.replace", refuse)
    rec.step()
    with pytest.raises(RecorderError, match="step 1 could not be written: Input/output error"):
        rec.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.json",
        "step-00000000.safetensors",
    ]


def test_after_a_failure_nothing_more_is_written(tmp_path, monkeypatch):
    rec = Recorder(net(), tmp_path)
    gate, original, calls = threading.Event(), rec._session._directory.write, []

    def fails_once(*arguments):
        gate.wait(30)
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(rec._session._directory, "write", fails_once)
    for _ in range(3):
        rec.step()
    gate.set()
    with pytest.raises(RecorderError, match="step 1 could not be written"):
        rec.close()
    assert sorted(stored(tmp_path)) == [0]  # no hole in the run, though there was room again


def test_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        "lcray.checkpoints.directory.os.fsync", lambda fd: (events.append("sync"), fsync(fd))
    )
    monkeypatch.setattr(
        "lcray.checkpoints.directory.os.replace",
        lambda a, b: (events.append(b.name), replace(a, b)),
    )
    rec = Recorder(net(), tmp_path)
    rec.step()
    rec.close()
    one = ["sync", "{}", "sync"]
    names = ["run.json", "step-00000000.safetensors", "step-00000001.safetensors", "run.json"]
    assert events == [event.format(name) for name in names for event in one]


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EACCES"])
def test_file_systems_that_sync_no_folders_are_recorded_on(tmp_path, monkeypatch, code):
    """Older CIFS and some Ceph refuse it; what there is cannot be more durable there."""
    number, fsync = getattr(errno, code), os.fsync

    def refusing(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refusing)
    model = net()
    with Recorder(model, tmp_path) as rec:
        rec.step()
    with Recorder(model, tmp_path, start=0, overwrite=True) as rec:  # which removes files
        rec.step()
    assert sorted(stored(tmp_path)) == [0, 1]
    write_json_atomic(tmp_path / "out" / "a.json", {"a": 1})
    assert write_json_atomic(tmp_path / "out" / "b.json", {"a": 1}, exclusive=True)
    sync_folder(tmp_path)


def test_a_folder_that_could_be_synced_and_was_not_is_an_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def failing(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RecorderError, match="Input/output error"):
        Recorder(net(), tmp_path / "run")
    with pytest.raises(OutputError, match="Input/output error"):
        write_json_atomic(tmp_path / "out" / "a.json", {"a": 1})


def test_memory_is_bounded_and_step_waits_for_the_disk(tmp_path, monkeypatch):
    model = nn.Linear(512, 256, bias=False)  # 0.5 MiB
    made = []

    class Counted(Slot):
        def __init__(self, *arguments, **keywords):
            made.append(1)
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr("lcray.checkpoints.recording.Slot", Counted)
    rec = Recorder(model, tmp_path, queue_mib=1.6)  # three slots
    gate, original = threading.Event(), rec._session._directory.write
    monkeypatch.setattr(
        rec._session._directory, "write", lambda *a: (gate.wait(30), original(*a)), raising=True
    )
    made.clear()
    for _ in range(3):
        rec.step()
    fourth = threading.Thread(target=rec.step)
    fourth.start()
    fourth.join(0.3)
    assert fourth.is_alive()  # all slots are queued: training waits
    gate.set()
    fourth.join(10)
    for _ in range(20):
        rec.step()
    rec.close()
    assert len(made) == 3
    assert sorted(stored(tmp_path)) == list(range(25))


def test_snapshots_in_the_queue_do_not_see_later_updates(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)
    rec = Recorder(model, tmp_path)
    gate, original = threading.Event(), rec._session._directory.write
    monkeypatch.setattr(rec._session._directory, "write", lambda *a: (gate.wait(30), original(*a)))
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(float(step))
        rec.step()
    gate.set()
    rec.close()
    found = stored(tmp_path)
    assert [found[step]["weight"].unique().tolist() for step in (1, 2, 3)] == [[1.0], [2.0], [3.0]]


def test_queued_files_survive_an_exit_without_close(tmp_path):
    code = """
import sys, time, torch
from lcray.checkpoints import Recorder, directory
write = directory.LockedDirectory.write
directory.LockedDirectory.write = lambda *a: (time.sleep(0.02), write(*a))
model = torch.nn.Linear(4, 4)
recorder = Recorder(model, sys.argv[1])
for _ in range(15):
    recorder.step()
if sys.argv[2] == "raise":
    raise ValueError("training failed")
"""
    for end in ("normal", "raise"):
        result = python(code, tmp_path / end, end, check=False)
        assert ("training failed" in result.stderr) == (end == "raise")
        assert sorted(stored(tmp_path / end)) == list(range(16))


def test_a_failure_at_exit_is_reported(tmp_path):
    code = """
import sys, torch
from lcray.checkpoints import Recorder, directory
recorder = Recorder(torch.nn.Linear(4, 4), sys.argv[1])
def fail(*_): raise OSError(28, "No space left on device")
directory.os.replace = fail
recorder.step()
"""
    assert (
        "step 1 could not be written: No space left" in python(code, tmp_path, check=False).stderr
    )


def test_a_killed_process_leaves_whole_files_and_can_resume(tmp_path):
    code = """
import os, signal, sys, threading, torch
from lcray.checkpoints import Recorder
model = torch.nn.Linear(300, 300)
recorder = Recorder(model, sys.argv[1])
threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
while True:
    with torch.no_grad():
        model.weight.add_(1.0)
    recorder.step()
"""
    assert python(code, tmp_path, check=False).returncode == -9
    (tmp_path / ".step-00009999.safetensors.tmp").write_bytes(b"torn")
    found = stored(tmp_path)
    assert sorted(found) == list(range(len(found)))
    model = nn.Linear(300, 300)
    model.load_state_dict(found[max(found)])
    Recorder(model, tmp_path).close()
    assert not list(tmp_path.glob(".*"))


def test_a_forked_copy_refuses_and_does_not_hang(tmp_path):
    code = """
import os, sys, torch
from lcray.checkpoints import Recorder
from lcray.errors import RecorderError
recorder = Recorder(torch.nn.Linear(4, 4), sys.argv[1])
recorder.step()
pid = os.fork()
if pid == 0:
    recorder.close()  # neither ends the parent's run nor frees its lock
    try:
        recorder.step()
    except RecorderError as error:
        sys.exit(7 if "writer thread is gone" in str(error) else 8)  # runs the exit handlers
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert '"ended": false' in open(sys.argv[1] + "/run.json").read()
try:
    Recorder(torch.nn.Linear(4, 4), sys.argv[1])
    sys.exit("the child freed the lock")
except RecorderError as error:
    assert "another recorder" in str(error)
recorder.step()
"""
    python(code, tmp_path)
    assert sorted(stored(tmp_path)) == [0, 1, 2]


def test_one_recorder_a_directory(tmp_path):
    rec = Recorder(net(), tmp_path)
    with pytest.raises(RecorderError, match="another recorder is writing here"):
        Recorder(net(), tmp_path)
    rec.close()
    rec.close()
    Recorder(net(), tmp_path).close()
    with pytest.raises(RecorderError, match="the recorder is closed"):
        rec.step()


def test_a_dropped_recorder_drains_and_frees_its_directory(tmp_path):
    rec = Recorder(net(), tmp_path)
    rec.step()
    del rec
    assert sorted(stored(tmp_path)) == [0, 1]
    Recorder(net(), tmp_path).close()


def test_a_living_fork_does_not_keep_the_lock(tmp_path):
    code = """
import os, sys, torch
from lcray.checkpoints import Recorder
model = torch.nn.Linear(4, 4)
recorder = Recorder(model, sys.argv[1])
end, start = os.pipe()
pid = os.fork()  # a data loader's worker, say
if pid == 0:
    os.close(start)
    os.read(end, 1)
    os._exit(0)
recorder.close()
Recorder(model, sys.argv[1]).close()
os.close(start)
os.waitpid(pid, 0)
"""
    python(code, tmp_path)


def test_a_file_system_without_locks_still_records(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("lcray.checkpoints.directory.fcntl.flock", unsupported)
    with Recorder(net(), tmp_path) as rec:
        rec.step()
    assert sorted(stored(tmp_path)) == [0, 1]


def test_an_unwritable_place_raises_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecorderError, match="cannot record here"):
        Recorder(net(), tmp_path / "file" / "run")
    with pytest.raises(RecorderError, match="cannot record here"):
        Recorder(net(), tmp_path / "file")


def test_the_error_of_the_loop_is_not_replaced_by_the_recorders(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="diverged") as caught, Recorder(net(), tmp_path) as rec:
        monkeypatch.setattr(rec._session._directory, "write", lambda *_: 1 / 0)
        rec.step()
        raise ValueError("diverged")
    assert "ZeroDivisionError" in caught.value.__notes__[0]
    monkeypatch.undo()
    with pytest.raises(RecorderError, match="step 1"), Recorder(net(), tmp_path) as rec:
        monkeypatch.setattr(rec._session._directory, "write", lambda *_: 1 / 0)
        rec.step()


def grow(model):
    model.append(nn.Linear(1, 1))


def untie(model):
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


def shrink(model):
    del model[1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (grow, r"'2.bias' is new"),
        (shrink, r"'1.bias' is gone"),
        (untie, "were tied"),
        (lambda model: model.double(), "was torch.float32"),
    ],
)
def test_a_model_that_changes_form_is_an_error_and_not_a_wrong_file(tmp_path, change, why):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    rec = Recorder(model, tmp_path)
    change(model)
    for _ in range(2):
        with pytest.raises(RecorderError, match=why):
            rec.step()
    rec.close()
    assert sorted(stored(tmp_path)) == [0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"queue_mib": 0},
        {"start": -1},
        {"overwrite": True},
        {"task": object()},
        {"metadata": {"a": object()}},
    ],
)
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(UsageError, match=next(iter(arguments))):
        Recorder(net(), tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_close_records_the_last_step_that_every_left_out(tmp_path):
    model = net()
    optimizer = sgd(model)
    with Recorder(model, tmp_path, every=5) as rec:
        for step in range(1, 8):
            update(model, optimizer, step)
            rec.step()
        expected = clones(model)
    found = stored(tmp_path)
    assert sorted(found) == [0, 5, 7]
    assert_same(found[7], expected)
    content = json.loads((tmp_path / "run.json").read_text())
    assert (content["ended"], content["last_step"]) == (True, 7)
    with Recorder(model, tmp_path, every=5, start=7) as rec:
        for step in range(8, 11):
            update(model, optimizer, step)
            rec.step()
    found = stored(tmp_path)
    assert sorted(found) == [0, 5, 7, 10]
    assert_same(found[10], clones(model))
    with Recorder(model, tmp_path, every=5, start=10):
        pass  # nothing was left out
    assert sorted(stored(tmp_path)) == [0, 5, 7, 10]


def test_an_error_in_the_block_records_no_half_made_step(tmp_path):
    model = net()
    with pytest.raises(ZeroDivisionError), Recorder(model, tmp_path, every=5) as rec:
        for _ in range(7):
            rec.step()
        raise ZeroDivisionError
    assert sorted(stored(tmp_path)) == [0, 5]
    with Recorder(model, tmp_path, every=5, start=5) as rec:
        rec.step()
    assert sorted(stored(tmp_path)) == [0, 5, 6]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have priorities on Linux")
def test_only_the_writer_thread_steps_back(tmp_path):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with Recorder(net(), tmp_path) as recorder:
        writer = recorder._session.writer._thread
        deadline = time.monotonic() + 10
        while os.getpriority(os.PRIO_PROCESS, writer.native_id) != 19:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert os.getpriority(os.PRIO_PROCESS, 0) == before


class Scaled(nn.Linear):
    """Multiplies by a number that is neither parameter nor buffer."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.scale = 1.0

    def get_extra_state(self):
        return torch.tensor([self.scale, 7.0])

    def set_extra_state(self, state):
        self.scale = float(state[0])


def test_extra_states_that_are_tensors_are_recorded_as_a_state_dict_has_them(tmp_path):
    model = nn.Sequential(Scaled(2, 3), nn.ReLU(), Scaled(3, 2))
    with Recorder(model, tmp_path) as rec:
        model[0].scale = 2.0
        rec.step()
    with Recorder(model, tmp_path) as rec:  # resumes: the model is what the last file holds
        assert rec.last_step == 1
    state = open_series(tmp_path).read(1).tensors
    assert state.keys() == model.state_dict().keys()
    assert state["0._extra_state"].tolist() == [2.0, 7.0]
    fresh = nn.Sequential(Scaled(2, 3), nn.ReLU(), Scaled(3, 2))
    fresh.load_state_dict(state)
    assert (fresh[0].scale, fresh[2].scale) == (2.0, 1.0)


def test_an_extra_state_that_nothing_could_load_is_refused(tmp_path):
    class Unloadable(nn.Linear):
        def get_extra_state(self):
            return torch.ones(1)

    with pytest.raises(RecorderError, match=r"^tensor '1\._extra_state': .*no set_extra_state"):
        Recorder(nn.Sequential(nn.ReLU(), Unloadable(2, 2)), tmp_path)

    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

    with Recorder(Noted(2, 2), tmp_path):  # no tensor: files have no place for it
        pass
    assert open_series(tmp_path, minimum=1).read(0).tensors.keys() == {"weight", "bias"}


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800", "\udfffb"])
def test_names_that_no_file_can_hold_are_refused_at_once(tmp_path, name):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(2)))
    with pytest.raises(
        RecorderError, match="a name that safetensors cannot hold; rename it"
    ) as bad:
        Recorder(model, tmp_path / "run")
    str(bad.value).encode()
    assert not list(tmp_path.glob("run/*.safetensors"))
    inner = nn.Module()
    inner.add_module("part", model)
    if name == "__metadata__":  # only as a whole name
        with Recorder(inner, tmp_path / "inner"):
            pass
        assert list(open_series(tmp_path / "inner", minimum=1).read(0).tensors) == [f"part.{name}"]
