"""What to do about a file that could not be written: room is made only where there is none."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from lcray.checkpoints import Recorder
from lcray.errors import OutputError, RecorderError
from lcray.storage import cure
from lcray.storage.files import write_json_atomic, writing


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ENOSPC", "make room"),
        ("EDQUOT", "make room"),
        ("EFBIG", "raise the limit of a file's size (ulimit -f)"),
        ("EACCES", "give access"),
        ("EPERM", "give access"),
        ("EROFS", "give access"),
        ("ENOENT", "put its folder back"),
        ("ESTALE", "put its folder back"),
        ("ENOTDIR", "move away the file that is where its folder should be"),
        ("ELOOP", "put a real file or folder in the place of the link"),
        ("EEXIST", "move away what is in its place"),
        ("EIO", "check the storage"),
        ("EINVAL", "check the storage"),
    ],
)
def test_every_failure_has_its_own_cure(code: str, words: str) -> None:
    number = getattr(errno, code)
    assert cure(OSError(number, os.strerror(number))) == words


def test_errors_of_object_stores_have_no_number() -> None:
    assert cure(PermissionError("no")) == "give access"
    assert cure(FileNotFoundError("no")) == "put its folder back"


def test_a_link_in_circles_is_not_cured_by_room(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    path = tmp_path / "out" / "a.json"
    with pytest.raises(OutputError, match=r"links.*; put a real file") as error, writing(path):
        path.write_text("")
    assert "room" not in str(error.value)


def test_a_folder_that_was_removed_is_not_cured_by_room(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "a.json"
    with (
        pytest.raises(OutputError, match=r"directory\); put its folder back") as out,
        writing(path),
    ):
        path.write_text("")
    assert "room" not in str(out.value) and "is kept" not in str(out.value)
    model = nn.Linear(2, 2)
    recorder = Recorder(model, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with torch.no_grad():
        model.weight.add_(1.0)
    recorder.step()
    with pytest.raises(RecorderError, match="step 1 could not be written: No such file") as run:
        recorder.close()
    assert "put its folder back and resume" in str(run.value) and "room" not in str(run.value)


def test_where_no_more_files_can_be_made_it_says_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=4", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        with pytest.raises(OutputError, match="remove files, since no more can be made") as error:
            for number in range(9):
                write_json_atomic(disk / f"{number}.json", {})
        assert "No space left" in str(error.value)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
