"""Finding and reading checkpoints: every layout, every kind of bad file."""

import hashlib
import json
import math
import os
import pickle
import shlex
import struct
import subprocess

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import lcray
from lcray.checkpoints import header, naming, open_series
from lcray.checkpoints.bits import count_unchanged, same_bits
from lcray.checkpoints.series import CheckpointSeries
from lcray.cli.convert import convert
from lcray.errors import CheckpointError, UsageError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(3, 4, generator=generator),
        "fc.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "n": torch.tensor(7 + seed),
    }


def put(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors(seed), path)
    return path


def put_raw(path, head, data=b""):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_numeric_order_and_exact_content(tmp_path):
    for step in (9000, 10000, 500, 0):
        put(tmp_path / f"step_{step}.safetensors", step)
    series = open_series(tmp_path)
    assert series.steps == (0, 500, 9000, 10000)
    state = series.read(10000)
    raw = (tmp_path / "step_10000.safetensors").read_bytes()
    assert state.sha256 == hashlib.sha256(raw).hexdigest()
    assert state.nbytes == series.checkpoints[-1].nbytes == len(raw)
    expected = tensors(10000)
    assert state.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state.tensors[name].dtype == tensor.dtype
        assert same_bits(state.tensors[name], tensor)


def test_tensors_are_writable_and_independent_of_the_file(tmp_path):
    path = put(tmp_path / "step_1.safetensors")
    state = open_series(tmp_path, minimum=1).read(1)
    before = path.read_bytes()
    state.tensors["fc.weight"].zero_()
    path.write_bytes(b"x" * len(before))
    assert state.tensors["fc.weight"].eq(0).all()
    assert same_bits(state.tensors["fc.bias"], tensors()["fc.bias"])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(None, (0, 10, 20, 30)), ("10:20", (10, 20)), (":10", (0, 10)), ("11:", (20, 30))],
)
def test_step_ranges_include_both_ends(tmp_path, steps, expected):
    for step in (0, 10, 20, 30):
        put(tmp_path / f"model_step{step}.safetensors", step)
    assert open_series(tmp_path, steps).steps == expected


@pytest.mark.parametrize("steps", ["5", "a:b", "1:2:3", "-1:4", "٤:", "1e3:", "0:7.5"])
def test_bad_ranges(tmp_path, steps):
    with pytest.raises(UsageError, match="write a:b"):
        open_series(tmp_path, steps)


@pytest.mark.parametrize("step", [str(2**63), str(10**30), "9" * 5000])
def test_steps_of_a_range_end_where_those_of_tables_do(tmp_path, step):
    put(tmp_path / "step-1.safetensors")
    for steps in (f"0:{step}", f"{step}:", f"{step}:{step}"):
        with pytest.raises(UsageError, match=r"steps end at 2\*\*63") as caught:
            open_series(tmp_path, steps)
        assert len(str(caught.value)) < 200
    zeros = "0" * 5000
    assert open_series(tmp_path, f"{zeros}1:{2**63 - 1}", minimum=1).steps == (1,)


def test_folders_pick_the_model_and_not_its_neighbours(tmp_path):
    for step, name in ((500, "model"), (1000, "adapter_model"), (2000, "custom")):
        folder = tmp_path / f"checkpoint-{step}"
        put(folder / f"{name}.safetensors", step)
        put(folder / "optimizer.safetensors", 1)
        (folder / "rng_state.pth").write_bytes(b"never opened")
    put(tmp_path / "model.safetensors")  # the final model beside the checkpoints: no step
    (tmp_path / "logs-2024").mkdir()
    (tmp_path / "checkpoint-3000").mkdir()  # a save that was interrupted
    put(tmp_path / "tmp-checkpoint-4000" / "model.safetensors")
    series = open_series(tmp_path)
    assert series.steps == (500, 1000, 2000)
    assert [int(series.read(step).tensors["n"]) for step in series.steps] == [507, 1007, 2007]


def test_two_models_in_a_folder_are_ambiguous(tmp_path):
    put(tmp_path / "checkpoint-1" / "a.safetensors")
    put(tmp_path / "checkpoint-1" / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"a.safetensors, b.safetensors is the model"):
        open_series(tmp_path)


def test_flat_and_nested_may_mix_but_not_repeat_a_step(tmp_path):
    put(tmp_path / "step-1.safetensors")
    put(tmp_path / "checkpoint-2" / "model.safetensors")
    assert open_series(tmp_path).steps == (1, 2)
    put(tmp_path / "checkpoint-1" / "model.safetensors")
    with pytest.raises(CheckpointError, match="are both step 1"):
        open_series(tmp_path)


def test_tensors_come_in_the_order_of_the_header(tmp_path):
    head, end = {}, 0
    for name in ("z", "m", "a", "q", "b", "y", "c", "x"):
        head[name] = {"dtype": "U8", "shape": [2], "data_offsets": [end, end + 2]}
        end += 2
    put_raw(tmp_path / "step-1.safetensors", head, b"\x00" * end)
    assert list(open_series(tmp_path, minimum=1).read(1).tensors) == list(head)


def test_wrapper_prefixes_are_removed(tmp_path):
    save_file({"module._orig_mod.a": torch.ones(1)}, tmp_path / "step-1.safetensors")
    assert list(open_series(tmp_path, minimum=1).read(1).tensors) == ["a"]


# Runs that cannot be opened


def test_missing_empty_single_and_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such run"):
        open_series(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no checkpoints; record some"):
        open_series(tmp_path)
    below = put(tmp_path / "mine" / "step-3.safetensors")
    with pytest.raises(CheckpointError, match=f"no checkpoints, but {below.parent} has some"):
        open_series(tmp_path)
    below.unlink()
    path = put(tmp_path / "step-3.safetensors")
    with pytest.raises(CheckpointError, match=r"1 checkpoint\(s\) of 1 .* at least 2"):
        open_series(tmp_path)
    with pytest.raises(CheckpointError, match="this is a file"):
        open_series(path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        open_series(tmp_path, minimum=1).read(4)


def test_one_checkpoint_is_no_run(tmp_path):
    put(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no file name holds a step"):
        open_series(tmp_path)


@pytest.mark.parametrize("name", ["step-1.pt", "step-1.ckpt", "checkpoint-1/pytorch_model.bin"])
def test_pickles_are_never_opened_and_the_error_converts_them(tmp_path, name):
    path = tmp_path / "saved" / name
    path.parent.mkdir(parents=True)
    torch.save({"a": torch.arange(3.0)}, path)
    with pytest.raises(CheckpointError, match="never opened") as caught:
        open_series(tmp_path / "saved")
    command = str(caught.value).split("convert them: ")[1]
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("lcray", "convert")
    CliRunner().invoke(convert, words, catch_exceptions=False)  # the advice works as it stands
    state = open_series(words[1], minimum=1).read(1)
    assert torch.equal(state.tensors["a"], torch.arange(3.0))


def test_distributed_checkpoints_are_never_opened_either(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert them: lcray convert"):
        open_series(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_code(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("step-1.pt", "step-2.safetensors", "step-3.safetensors"):
        (run / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for step in open_series(run).steps:
        with pytest.raises(CheckpointError, match="does not fit"):
            open_series(run).read(step)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((run / "step-1.pt").read_bytes())
    assert (tmp_path / "exploded").exists()  # the bomb works


# Files that cannot be read

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty file": (None, b""),
    "seven bytes": (None, b"\x00" * 7),
    "huge length": (None, struct.pack("<Q", 2**63) + b"{}"),
    "length past the end": (None, struct.pack("<Q", 100) + b"{}"),
    "length 0": (None, struct.pack("<Q", 0) + b"{}"),
    "not JSON": (b"not json", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "a list": (b"[]", b""),
    "deep nesting": (b"[" * 200_000, b""),
    "duplicate name": (b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), b"\x00" * 4),
    "tensor no object": ({"a": 1}, b""),
    "unknown dtype": ({"a": {**ONE, "dtype": "F12"}}, b"\x00" * 4),
    "dtype no string": ({"a": {**ONE, "dtype": []}}, b"\x00" * 4),
    "negative shape": ({"a": {**ONE, "shape": [-1]}}, b"\x00" * 4),
    "overflowing shape": ({"a": {**ONE, "shape": [2**62, 2**62]}}, b"\x00" * 4),
    "empty overflowing shape": (
        {"a": {**ONE, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        b"",
    ),
    "half a character": (b'{"\\ud800": %s}' % json.dumps(ONE).encode(), b"\x00" * 4),
    "boolean shape": ({"a": {**ONE, "shape": [True]}}, b"\x00" * 4),
    "negative offset": ({"a": {**ONE, "data_offsets": [-4, 0]}}, b"\x00" * 4),
    "offsets past the end": ({"a": {**ONE, "data_offsets": [4, 8]}}, b"\x00" * 4),
    "one offset": ({"a": {**ONE, "data_offsets": [0]}}, b"\x00" * 4),
    "overlap": ({"a": ONE, "b": ONE}, b"\x00" * 4),
    "hole": ({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, b"\x00" * 12),
    "torn data": ({"a": ONE}, b"\x00" * 3),
    "trailing data": ({"a": ONE}, b"\x00" * 5),
    "metadata no strings": ({"__metadata__": {"a": 1}, "a": ONE}, b"\x00" * 4),
    "names collide": ({"a.w": ONE, "a._orig_mod.w": {**ONE, "data_offsets": [4, 8]}}, b"\x00" * 8),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_name_step_file_and_remedy(tmp_path, case):
    head, data = HOSTILE[case]
    path = tmp_path / "step-5.safetensors"
    if head is None:
        path.write_bytes(data)
    else:
        put_raw(path, head, data)
    with pytest.raises(CheckpointError, match=r"step 5, .*step-5.*cannot be read.*--steps") as e:
        open_series(tmp_path, minimum=1).read(5)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "case", [c for c, (head, _) in HOSTILE.items() if head is not None and c != "names collide"]
)
def test_our_own_check_comes_before_the_loader(case):
    head, data = HOSTILE[case]
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    with pytest.raises(ValueError):
        header.parse(text, len(data))


def test_a_valid_handwritten_file_passes_the_same_checks(tmp_path):
    put_raw(tmp_path / "step-5.safetensors", {"a": ONE}, struct.pack("<f", 1.5))
    assert open_series(tmp_path, minimum=1).read(5).tensors["a"].item() == 1.5


def test_directory_pipe_and_dangling_link_in_place_of_a_file(tmp_path):
    (tmp_path / "step-1.safetensors").mkdir()
    os.mkfifo(tmp_path / "step-2.safetensors")  # opening it would wait for ever
    (tmp_path / "step-3.safetensors").symlink_to(tmp_path / "nowhere")
    series = open_series(tmp_path)
    assert series.steps == (1, 2, 3)
    for step, why in ((1, "regular file"), (2, "regular file"), (3, "No such file")):
        with pytest.raises(CheckpointError, match=f"step {step}.*{why}"):
            series.read(step)


def test_what_reading_may_hit_beyond_bad_bytes(tmp_path, monkeypatch):
    put(tmp_path / "step-1.safetensors")
    run = open_series(tmp_path, minimum=1)
    for error, why in (
        (MemoryError(), "does not fit into memory"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(header, "parse", fail)
        with pytest.raises(CheckpointError, match=f"step 1.*{why}"):
            run.read(1)
        monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be listed: File name too long"):
        open_series(tmp_path / ("x" * 300))


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = put(tmp_path / "step-1.safetensors")
    parse = header.parse

    def grow(*arguments):
        with path.open("ab") as file:
            file.write(b"more")
        return parse(*arguments)

    monkeypatch.setattr(header, "parse", grow)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        open_series(tmp_path, minimum=1).read(1)


def test_bits_tell_apart_what_equality_does_not():
    zero, nan = torch.tensor([0.0, 1.0]), torch.tensor([math.nan])
    assert not same_bits(zero, torch.tensor([-0.0, 1.0]))
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, zero[:1]) and not same_bits(zero, zero.double())
    assert count_unchanged(zero, torch.tensor([-0.0, 1.0])) == 1


VALID = save(tensors())


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cut=st.integers(0, len(VALID)),
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    keep=st.booleans(),
)
def test_corrupted_bytes_give_an_error_or_a_correct_read(tmp_path, cut, flips, keep):
    data = bytearray(VALID)
    for place, value in flips:
        data[place] = value
    data = bytes(data) if keep else bytes(data[:cut])
    (tmp_path / "step-1.safetensors").write_bytes(data)
    try:
        state = open_series(tmp_path, minimum=1).read(1)
    except CheckpointError:
        assert data != VALID
        return
    assert len(data) == len(VALID)  # no truncation passes
    size = sum(t.numel() * t.element_size() for t in state.tensors.values())
    assert size == len(VALID) - 8 - int.from_bytes(data[:8], "little")
    twin = safetensors.torch.load(data)
    names = naming.canonical_names(twin)
    assert state.tensors.keys() == set(names.values())
    assert all(same_bits(state.tensors[names[key]], tensor) for key, tensor in twin.items())


class Counted(tuple):
    """A tuple that counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_looking_a_step_up_does_not_go_through_the_run(tmp_path):
    for step in range(0, 60, 3):
        put(tmp_path / f"step-{step}.safetensors", step)
    checkpoints = Counted(open_series(tmp_path).checkpoints)
    series = CheckpointSeries(tmp_path, checkpoints)
    for _ in range(3):
        assert [series.checkpoint(step).step for step in series.steps] == list(range(0, 60, 3))
    assert checkpoints.passes <= 2
    assert series == CheckpointSeries(tmp_path, tuple(checkpoints))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; there are 20, from"):
        series.checkpoint(1)


def test_a_directory_is_listed_once_however_many_indexes_it_holds(tmp_path, monkeypatch):
    for step in (1, 2, 10, 11, 100):
        for i in (2, 1):
            name = f"step-{step}-0000{i}-of-00002.safetensors"
            save_file({f"t{i}": torch.tensor(step)}, tmp_path / name)
        shards = {f"t{i}": f"step-{step}-0000{i}-of-00002.safetensors" for i in (1, 2)}
        index = tmp_path / f"step-{step}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "step-1-00001-of-00002.safetensors.bak").write_bytes(b"")
    (tmp_path / "step-1-notes.safetensors.txt").write_bytes(b"")
    calls, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: calls.append(path) or scandir(path))
    tried, is_shard_of = [], naming.is_shard_of
    monkeypatch.setattr(naming, "is_shard_of", lambda *a: tried.append(a) or is_shard_of(*a))
    series = open_series(tmp_path)
    assert calls == [tmp_path]
    assert len(tried) == 5 * 2 + 2  # not every name for every index
    assert series.steps == (1, 2, 10, 11, 100)
    for step, checkpoint in zip(series.steps, series.checkpoints, strict=True):
        assert [file.name for file in checkpoint.files] == [
            f"step-{step}.safetensors.index.json",
            f"step-{step}-00001-of-00002.safetensors",
            f"step-{step}-00002-of-00002.safetensors",
        ]
        assert {int(t) for t in series.read(step).tensors.values()} == {step}


# Sharded checkpoints


def shards(folder, weight_map=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    default = {
        "b": "model-00002-of-00002.safetensors",
        "a": "model-00001-of-00002.safetensors",
    }
    index = {"metadata": {}, "weight_map": weight_map or default}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_checkpoint_reads_as_one(tmp_path):
    folder = shards(tmp_path / "checkpoint-7")
    series = open_series(tmp_path, minimum=1)
    files = series.checkpoints[0].files
    assert [file.name for file in files] == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    state = series.read(7)
    assert torch.equal(state.tensors["a"], torch.ones(2))
    assert torch.equal(state.tensors["b"], torch.zeros(2))
    raw = b"".join(file.read_bytes() for file in files)
    assert state.sha256 == hashlib.sha256(raw).hexdigest()
    assert state.nbytes == series.checkpoints[0].nbytes == len(raw)
    assert folder.exists()


S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "why"),
    [
        ({"a": "../secret.safetensors"}, "not a file beside it"),
        ({"a": "/etc/secret.safetensors"}, "not a file beside it"),
        ({"a": 3}, "not a file beside it"),
        ({"a": S1, "b": "model-00003-of-00003.safetensors"}, "is missing"),
        ({"a": S2, "b": S2}, "disagree about tensor 'a'"),
        ({"a": S1, "b": S1}, "disagree about tensor 'b'"),
    ],
)
def test_bad_weight_maps(tmp_path, weight_map, why):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    shards(tmp_path / "checkpoint-7", weight_map)
    with pytest.raises(CheckpointError, match=f"step 7.*{why}"):
        open_series(tmp_path, minimum=1).read(7)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_bad_indexes(tmp_path, text):
    folder = shards(tmp_path / "checkpoint-7")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step 7.*the index"):
        open_series(tmp_path, minimum=1).read(7)


def test_torn_shard_is_named(tmp_path):
    folder = shards(tmp_path / "checkpoint-7")
    data = (folder / S2).read_bytes()
    (folder / S2).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"in the shard {S2}"):
        open_series(tmp_path, minimum=1).read(7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_sharded_model_with_tied_embeddings(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    expected = {}
    for step in (500, 1000):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="10KB")
        expected[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model.transformer.wte.weight.add_(1.0)
    series = open_series(tmp_path)
    assert len(series.checkpoints[0].files) > 2
    for step in series.steps:
        stored = series.read(step).tensors
        assert expected[step].keys() - stored.keys() == {"lm_head.weight"}  # tied: stored once
        assert all(same_bits(stored[name], expected[step][name]) for name in stored)


def test_a_step_that_no_table_can_hold(tmp_path):
    put(tmp_path / "step-1.safetensors")
    put(tmp_path / f"step-{2**63 - 1}.safetensors")
    assert open_series(tmp_path).steps == (1, 2**63 - 1)
    put(tmp_path / f"step-{10**19}.safetensors")
    with pytest.raises(CheckpointError, match=rf"step-{10**19}.*steps end at 2\*\*63"):
        open_series(tmp_path)


@pytest.mark.parametrize(
    "folder", ["with space", "it's", 'a "quote"', "$(touch executed)", "`touch executed`"]
)
def test_the_command_that_converts_pickles_works_for_any_name(tmp_path, monkeypatch, folder):
    path = tmp_path / folder / "step-1.pt"
    path.parent.mkdir()
    torch.save({"a": torch.arange(3.0)}, path)
    with pytest.raises(CheckpointError, match="never opened") as caught:
        open_series(path.parent)
    command = str(caught.value).split("convert them: ")[1]
    monkeypatch.chdir(tmp_path)
    words = subprocess.run(
        ["bash", "-c", "lcray() { printf '%s\\0' \"$@\"; }; " + command],
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    assert not (tmp_path / "executed").exists()
    assert words[:3] == [b"convert", os.fsencode(path.parent), os.fsencode(path.parent) + b"-run"]


@pytest.mark.parametrize("odd", ["step--7", "step-7.5", "step-٧", "step-1e3"])
@pytest.mark.parametrize("form", ["{}.safetensors", "{}/model.safetensors"])
def test_a_name_that_says_another_number_is_refused_and_inspect_says_so(tmp_path, odd, form):
    """Each was taken for step 7 or 1, and stood in for the checkpoint that has that name."""
    for step in (0, 2):
        put(tmp_path / f"step-{step}.safetensors", step)
    put(tmp_path / form.format(odd), 9)
    for read in (open_series, lcray.inspect):
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}: {odd}.*: its number ") as caught:
            read(tmp_path)
        assert "rename it, or move it away" in str(caught.value)


def test_metadata_that_is_null_is_none(tmp_path):
    """The reader of safetensors itself takes it so."""
    text = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": None}
    put_raw(tmp_path / "step-1.safetensors", text, struct.pack("<f", 2.5))
    whole = safetensors.torch.load_file(tmp_path / "step-1.safetensors")
    found = open_series(tmp_path, minimum=1).read(1).tensors
    assert found["w"].tolist() == whole["w"].tolist() == [2.5]
    put_raw(tmp_path / "step-2.safetensors", text | {"__metadata__": 3}, bytes(4))
    with pytest.raises(CheckpointError, match="__metadata__ is not an object of strings"):
        open_series(tmp_path, minimum=1).read(2)
