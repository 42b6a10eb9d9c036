"""`lcray convert` of hostile files: what it takes follows from the bytes that are there."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import TESTS
from torch import Tensor

import lcray
from lcray.checkpoints import open_series
from lcray.errors import CheckpointError

MB = 1 << 20


class Makes:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.called


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, pickled: Any = None) -> None:
    """The file with its entries compressed, or with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            if pickled is not None and name.endswith("data.pkl"):
                data = pickle.dumps(pickled, protocol=2)
            archive.writestr(name, data)


def expanded(path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(500 * MB)}, path)


def expanded_beyond_memory(path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(10**12)}, path)


def of_old(path: Path) -> None:
    state = {"w": torch.ones(1).expand(500 * MB)}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def overlapping(path: Path) -> None:
    whole = torch.ones(MB // 4)
    torch.save({f"w{i}": whole[i:] for i in range(2000)}, path)


def deflated(path: Path) -> None:
    torch.save({"w": torch.zeros(50 * MB)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)


def empty(path: Path) -> None:
    torch.save({"w": torch.ones(1)}, path)
    rezipped(path, pickled={"w": Makes(torch.Tensor, 500 * MB)})


def made_bytes(path: Path) -> None:
    torch.save({"w": torch.ones(1)}, path)
    rezipped(path, pickled={"w": 1, "more": Makes(bytearray, 2000 * MB)})


CHILD = """
import json, sys
from lcray.checkpoints.convert.convert import convert
from lcray.errors import CheckpointError
from benchmarks.peaks import forget_peak, peak_bytes, resident_bytes
for file in sys.argv[1:]:
    before, said = resident_bytes(), ""
    forget_peak()
    try:
        convert(file, file + ".run")
    except CheckpointError as error:
        said = str(error)
    print(json.dumps([said, (peak_bytes() - before) >> 20]))
"""
HOSTILE: dict[Callable[[Path], None], str] = {
    expanded: "its tensors take 2,097,152,000 bytes, the file has ",
    expanded_beyond_memory: "its tensors take 4,000,000,000,000 bytes, the file has ",
    of_old: "its tensors take 2,097,152,000 bytes, the file has ",
    overlapping: "its tensors take 2,089,",
    deflated: "takes 209,715,",
    empty: "its tensors take 2,097,152,000 bytes, the file has ",
    made_bytes: "holds a bytearray, which may take more memory than the file",
}


@pytest.mark.slow
def test_small_files_take_little(tmp_path: Path) -> None:
    files = {make: tmp_path / f"{make.__name__}-1.pt" for make in HOSTILE}
    for make, file in files.items():
        make(file)
    done = subprocess.run(  # one for all: importing torch takes the time
        [sys.executable, "-c", CHILD, *map(str, files.values())],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (make, file), line in zip(files.items(), done.stdout.splitlines(), strict=True):
        said, taken = json.loads(line)
        assert said.startswith(f"{file}: {HOSTILE[make]}")
        assert taken < 60, make  # MiB; files have 3 at most, torch loads some code once
        assert not Path(f"{file}.run").exists()


def test_what_the_lines_advise_works(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    file = tmp_path / "saved" / "step-1.pt"
    state = {"w": torch.ones(1).expand(2 * MB)}
    torch.save({name: value.clone() for name, value in state.items()}, file)
    lcray.convert(file, tmp_path / "run")
    assert open_series(tmp_path / "run", minimum=1).read(1).tensors["w"].shape == (2 * MB,)
    made_bytes(file)
    torch.save({"w": torch.ones(2), "more": bytearray(b"abc")}, file)
    with pytest.raises(CheckpointError, match="holds a bytearray"):
        lcray.convert(file, tmp_path / "other")
    assert lcray.convert(file, tmp_path / "other", trust_pickle=True).steps == (1,)


def test_views_that_share_their_memory_are_welcome(tmp_path: Path) -> None:
    fused = torch.randn(768, 512)
    state: dict[str, Tensor] = {
        "fused": fused,
        "query": fused[:256],
        "turned": fused.T,
        "tied": fused,
        "mask": torch.ones(1).expand(64, 64),
    }
    for number, wide in enumerate((True, False)):
        file = tmp_path / f"step-{number}.pt"
        torch.save(state, file, _use_new_zipfile_serialization=wide)
        lcray.convert(file, tmp_path / f"run-{number}")
        stored = open_series(tmp_path / f"run-{number}", minimum=1).read(number).tensors
        for name in state.keys() - {"tied"}:
            assert torch.equal(stored[name], state[name]), name


def test_a_compressed_file_that_takes_no_more_is_welcome(tmp_path: Path) -> None:
    file = tmp_path / "step-1.pt"
    torch.save({"w": torch.randint(256, (MB,), dtype=torch.uint8)}, file)
    rezipped(file)  # as `zip -0` would
    lcray.convert(file, tmp_path / "run")


@pytest.mark.parametrize("where", ["before", "after", "pointer"])
def test_an_index_that_readers_may_find_elsewhere(where: str, tmp_path: Path) -> None:
    file = tmp_path / "step-1.pt"
    torch.save({"w": torch.ones(3)}, file)
    data, other = file.read_bytes(), io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("x", "y")
    if where == "before":  # Python's reader shifts offsets, torch's does not
        data = other.getvalue() + data
    elif where == "after":
        data += b"\0"
    else:
        data = data[:-34] + struct.pack("<Q", 0) + data[-26:]
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read: its index is not at its end"):
        lcray.convert(file, tmp_path / "run")
