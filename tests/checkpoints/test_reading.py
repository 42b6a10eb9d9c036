"""Reading into memory that the caller owns, against the reference loader."""

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from io import BufferedReader, FileIO

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lcray.checkpoints import header, open_series, reading
from lcray.checkpoints.bits import same_bits
from lcray.errors import CheckpointError

SHAPES = {"scalar": (), "empty": (0,), "hollow": (3, 0, 2), "vector": (5,), "cube": (3, 4, 5)}


def arbitrary(dtype, shape, seed=0):
    """Any bit patterns, NaN and denormal numbers included; 0 and 1 for booleans."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def run_of(tmp_path, tensors, **options):
    save_file(tensors, tmp_path / "step-1.safetensors", **options)
    return open_series(tmp_path, minimum=1)


def loaded(tmp_path):
    return safetensors.torch.load((tmp_path / "step-1.safetensors").read_bytes())


@pytest.mark.parametrize("dtype", header.CODES, ids=str)
def test_every_dtype_comes_as_the_reference_loads_it(tmp_path, dtype):
    run = run_of(tmp_path, {n: arbitrary(dtype, shape) for n, shape in SHAPES.items()})
    twin = loaded(tmp_path)
    into = {name: torch.empty(shape, dtype=dtype) for name, shape in SHAPES.items()}
    for state in (run.read(1), run.read(1, into)):
        assert state.tensors.keys() == twin.keys() == SHAPES.keys()
        assert state.dtypes == dict.fromkeys(SHAPES, dtype)
        for name, tensor in twin.items():
            assert state.tensors[name].dtype == tensor.dtype == dtype
            assert state.tensors[name].shape == tensor.shape
            assert same_bits(state.tensors[name], tensor)
            state.tensors[name].zero_()
    assert all(run.read(1, into).tensors[name] is into[name] for name in into)


def rank(dtype):
    """Complex above real above whole numbers."""
    return 2 * dtype.is_complex + dtype.is_floating_point


@pytest.mark.parametrize("target", header.CODES, ids=str)
def test_conversion_is_that_of_copy_and_never_drops_a_part_of_the_number(tmp_path, target):
    run = run_of(tmp_path, {code: arbitrary(d, (3, 5)) for code, d in header.DTYPES.items()})
    into = {code: torch.full((3, 5), 1).to(target) for code in header.DTYPES}
    before = {code: tensor.clone() for code, tensor in into.items()}
    state, twin = run.read(1, into), loaded(tmp_path)
    for code, stored in header.DTYPES.items():
        if torch.can_cast(stored, target):
            assert state.tensors[code] is into[code]
            assert same_bits(into[code], before[code].copy_(twin[code]))
        else:
            assert same_bits(state.tensors[code], twin[code])
            assert same_bits(into[code], before[code])
    kept = {d for code, d in header.DTYPES.items() if state.tensors[code] is not into[code]}
    assert {d for d in header.CODES if rank(d) > rank(target)} <= kept


@st.composite
def views(draw):
    """A shape, and how a destination of that shape lies in a flat vector."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(0, 1)) for _ in shape]  # elements left out after each row
    return tuple(shape), order, gaps


def placed(flat, view):
    """The destination that `view` describes, after the first two elements of `flat`."""
    shape, order, gaps = view
    stride, strides = 1, [0] * len(shape)
    for axis in reversed(order):
        strides[axis] = stride
        stride = stride * shape[axis] + gaps[axis]
    return flat.as_strided(shape, strides, 2)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layout=st.lists(views(), min_size=1, max_size=3),
    stored=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]),
    chunk=st.sampled_from([8, 16, 24, 64, 200, 4096]),
)
def test_any_strides_and_any_chunk_give_the_same_numbers(tmp_path, layout, stored, chunk):
    tensors = {f"t{i}": arbitrary(stored, view[0], i) for i, view in enumerate(layout)}
    run = run_of(tmp_path, tensors)
    flats = [torch.full((3000,), -7.5) for _ in layout]
    into = {f"t{i}": placed(flats[i], view) for i, view in enumerate(layout)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        state = run.read(1, into)
    raw = (tmp_path / "step-1.safetensors").read_bytes()
    assert (state.sha256, state.nbytes) == (hashlib.sha256(raw).hexdigest(), len(raw))
    for i, view in enumerate(layout):
        assert state.tensors[f"t{i}"] is into[f"t{i}"]
        expected = torch.full((3000,), -7.5)
        placed(expected, view).copy_(tensors[f"t{i}"])
        assert same_bits(flats[i], expected)  # the elements around it included


@pytest.mark.parametrize("limit", [1, 2, 7, 20, 59, 60, 61])
def test_pieces_are_bounded_and_follow_each_other(limit):
    cube = torch.arange(60.0).view(3, 4, 5)
    for tensor in (cube, cube.permute(2, 0, 1), cube.permute(0, 2, 1), cube[:, ::2], cube[1, :, 2]):
        found = list(reading.pieces(tensor, limit))
        assert all(piece.numel() <= limit for piece in found)
        assert torch.equal(torch.cat([p.reshape(-1) for p in found]), tensor.reshape(-1))
        assert all(
            tensor.data_ptr() <= piece.data_ptr() < tensor.data_ptr() + 240 for piece in found
        )


def test_what_has_no_destination_or_another_shape_is_new(tmp_path):
    stored = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.tensor(3)}
    run = run_of(tmp_path, stored)
    into = {
        "a": torch.zeros(3, 2),
        "b": torch.zeros(4, dtype=torch.float64),
        "elsewhere": torch.zeros(1),
    }
    state = run.read(1, into)
    assert state.tensors.keys() == state.dtypes.keys() == {"a", "b", "c"}
    assert torch.equal(state.tensors["a"], stored["a"]) and into["a"].eq(0).all()
    assert state.tensors["b"] is into["b"] and into["b"].eq(1).all()
    assert torch.equal(state.tensors["c"], stored["c"])
    assert state.dtypes == {"a": torch.float32, "b": torch.float32, "c": torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_destination_may_require_gradients(tmp_path, dtype):
    run = run_of(tmp_path, {"w": torch.arange(3.0)})
    into = {"w": torch.zeros(3, dtype=dtype, requires_grad=True)}
    assert run.read(1, into).tensors["w"] is into["w"]
    assert into["w"].tolist() == [0, 1, 2] and into["w"].requires_grad


def test_destinations_go_by_canonical_names(tmp_path):
    run = run_of(tmp_path, {"module._orig_mod.w": torch.ones(2)})
    into = {"w": torch.zeros(2), "module._orig_mod.w": torch.zeros(2)}
    assert run.read(1, into).tensors == {"w": into["w"]}
    assert into["w"].eq(1).all() and into["module._orig_mod.w"].eq(0).all()
    run = run_of(
        tmp_path, {"module.w": torch.ones(2)}, metadata={header.CANONICAL_KEY: "canonical"}
    )
    into = {"w": torch.zeros(2), "module.w": torch.zeros(2)}
    assert run.read(1, into).tensors == {"module.w": into["module.w"]}
    assert into["w"].eq(0).all() and into["module.w"].eq(1).all()


def test_shards_are_read_into_their_destinations(tmp_path):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    stored = {f"module.t{i}": torch.full((3, 2), float(i)) for i in range(4)}
    weight_map = {}
    for i, key in reversed(list(enumerate(stored))):
        weight_map[key] = f"model-0000{i % 2 + 1}-of-00002.safetensors"
    for name in set(weight_map.values()):
        save_file({k: stored[k] for k, n in weight_map.items() if n == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    into = {f"t{i}": torch.zeros(2, 3, dtype=torch.float64).T for i in (0, 1, 3)}
    run = open_series(tmp_path, minimum=1)
    state = run.read(7, into)
    assert list(state.tensors) == list(state.dtypes) == ["t3", "t2", "t1", "t0"]
    assert all(state.tensors[f"t{i}"].eq(i).all() for i in range(4))
    assert all(state.tensors[name] is tensor for name, tensor in into.items())
    assert set(state.dtypes.values()) == {torch.float32}
    raw = b"".join(file.read_bytes() for file in run.checkpoints[0].files)
    assert (state.sha256, state.nbytes) == (hashlib.sha256(raw).hexdigest(), len(raw))


class Watched(FileIO):
    """A file that remembers which bytes were asked for."""

    def __init__(self, path, log):
        super().__init__(path)
        self.log = log

    def readinto(self, buffer):
        start = self.tell()
        count = super().readinto(buffer)
        self.log.append((start, start + count))
        return count

    def seek(self, *arguments):
        raise AssertionError("a file is read in one pass")


def put_scattered(path, n=40):
    """Tensors of up to 100,000 bytes, the header's order not being that of the data."""
    sizes = [(i * 7919) % 25_000 for i in range(n)]
    starts = [4 * sum(sizes[:i]) for i in range(n)]
    values = [arbitrary(torch.float32, (size,), i) for i, size in enumerate(sizes)]
    entries = {
        f"t{i}": header.Entry(torch.float32, (sizes[i],), starts[i], starts[i] + 4 * sizes[i])
        for i in sorted(range(n), key=lambda i: (i * 17) % n)
    }
    data = b"".join(value.numpy().tobytes() for value in values)
    path.write_bytes(header.build(entries, {}) + data)
    return {name: values[int(name[1:])] for name in entries}


@pytest.mark.parametrize("given", [False, True])
def test_a_file_is_read_once_from_front_to_back(tmp_path, monkeypatch, given):
    expected = put_scattered(tmp_path / "step-1.safetensors")
    log = []
    monkeypatch.setattr(reading, "FileIO", lambda path: Watched(path, log))
    into = {k: torch.empty(v.shape, dtype=torch.float64) for k, v in expected.items()}
    state = open_series(tmp_path, minimum=1).read(1, into if given else None)
    assert list(state.tensors) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(state.tensors[name], tensor.double() if given else tensor)
    ends = [0, *(stop for _, stop in log)]
    assert [start for start, _ in log] == ends[:-1]
    assert ends[-1] == state.nbytes == (tmp_path / "step-1.safetensors").stat().st_size


def test_no_more_is_allocated_than_one_chunk_and_what_has_no_destination(tmp_path, monkeypatch):
    expected = put_scattered(tmp_path / "step-1.safetensors")
    into = {k: torch.empty(v.shape, dtype=torch.float64) for k, v in expected.items()}
    del into["t9"]
    monkeypatch.setattr(reading, "CHUNK", 4096)
    run, sizes, empty = open_series(tmp_path, minimum=1), [], torch.empty

    def counted(*arguments, **options):
        made = empty(*arguments, **options)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", counted)
    run.read(1, into)
    assert sorted(sizes) == sorted([4096, expected["t9"].nbytes])


PEAK = """
import sys, torch
from lcray.checkpoints import open_series

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

flat = torch.ones(12 << 20)
moved = flat.view(3, 1 << 10, 1 << 12).movedim(0, 1)
into = {"w": moved if sys.argv[2] == "moved" else flat}
run = open_series(sys.argv[1], minimum=1)
before = status("VmRSS")
run.read(1, into)
assert flat.sum() == 0
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", ["flat", "moved"])
@pytest.mark.slow
def test_memory_grows_by_little_while_a_large_tensor_is_read(tmp_path, case):
    shape = (12 << 20,) if case == "flat" else (1 << 10, 3, 1 << 12)
    run_of(tmp_path, {"w": torch.zeros(shape)})
    command = [sys.executable, "-c", PEAK, str(tmp_path), case]
    growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(growth) < 12 << 10  # kilobytes; the file has four times as much


# Files that change, and memory that is not there


def put_long(path):
    """A file whose header and data are both longer than what is read ahead."""
    data = torch.ones(50_000)
    entry = header.Entry(torch.float32, (50_000,), 0, 200_000)
    path.write_bytes(header.build({"w": entry}, {"note": "x" * 200_000}) + data.numpy().tobytes())


@pytest.mark.parametrize("at", ["check_length", "parse"])
@pytest.mark.parametrize("given", [False, True])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch, at, given):
    path = tmp_path / "step-1.safetensors"
    put_long(path)
    run, function = open_series(tmp_path, minimum=1), getattr(header, at)
    assert run.read(1).tensors["w"].eq(1).all()

    def shrink(*arguments):
        with path.open("r+b") as file:
            file.truncate(100_000 if at == "check_length" else 399_000)
        return function(*arguments)

    monkeypatch.setattr(header, at, shrink)
    into = {"w": torch.zeros(50_000)} if given else None
    with pytest.raises(CheckpointError, match=r"step 1, .*changed while it was read"):
        run.read(1, into)


def test_an_allocation_that_fails(tmp_path, monkeypatch):
    run = run_of(tmp_path, {"w": torch.ones(3)})

    def refuse(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a second line")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CheckpointError, match=r"step 1, .*does not fit into memory") as caught:
        run.read(1)
    assert "\n" not in str(caught.value)
    assert run.read(1, {"w": torch.zeros(3)}).tensors["w"].eq(1).all()  # needs none


def test_the_default_device_is_not_asked(tmp_path):
    run = run_of(tmp_path, {"w": torch.ones(3), "v": torch.ones(3)})
    into = {"v": torch.zeros(3, dtype=torch.float64)}
    with torch.device("meta"):
        state = run.read(1, into)
    assert state.tensors["w"].tolist() == into["v"].tolist() == [1, 1, 1]


def test_a_big_endian_machine_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    spec = importlib.util.spec_from_file_location("reading_again", reading.__file__)
    with pytest.raises(ImportError, match="little-endian"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_headers_that_are_kept_cannot_be_changed(tmp_path):
    run_of(tmp_path, {"w": torch.ones(3)})
    with BufferedReader(FileIO(tmp_path / "step-1.safetensors")) as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    found = header.parse(text, 12)
    with pytest.raises(TypeError):
        found.entries["w"] = None
    with pytest.raises(TypeError):
        found.metadata["w"] = ""
