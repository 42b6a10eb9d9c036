from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lcray.tasks.model import memory
from lcray.tasks.model.memory import available_bytes, cgroup_room

UNLIMITED_1 = 9223372036854771712  # what version 1 says where there is no limit


class Groups:
    """A tree of control groups as Linux shows it."""

    def __init__(self, folder: Path) -> None:
        self.mount, self.membership = folder / "cgroup", folder / "self"
        self.mount.mkdir()

    def belong(self, *lines: str) -> None:
        self.membership.write_text("".join(line + "\n" for line in lines))

    def two(self, path: str, limit: object, use: int, stat: str | None = None) -> None:
        self._write(self.mount / path, "memory.max", limit, "memory.current", use, stat)

    def one(self, path: str, limit: int, use: int, stat: str | None = None) -> None:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        self._write(self.mount / "memory" / path, names[0], limit, names[1], use, stat)

    def _write(
        self, group: Path, limit_name: str, limit: object, use_name: str, use: int, stat: str | None
    ) -> None:
        group.mkdir(parents=True, exist_ok=True)
        (group / limit_name).write_text(f"{limit}\n")
        (group / use_name).write_text(f"{use}\n")
        if stat is not None:
            (group / "memory.stat").write_text(stat)

    def room(self) -> int | None:
        return cgroup_room(self.membership, self.mount)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


class TestVersion2:
    def test_the_group_of_the_process(self, groups: Groups) -> None:
        groups.belong("0::/jobs/7")
        groups.two("jobs/7", 1000, 300)
        groups.two("jobs/8", 10, 10)
        assert groups.room() == 700

    def test_the_tightest_group_on_the_way_up_counts(self, groups: Groups) -> None:
        groups.belong("0::/jobs/7")
        groups.two("jobs/7", 1000, 300)
        groups.two("jobs", 5000, 4900)
        assert groups.room() == 100

    def test_a_group_without_a_limit(self, groups: Groups) -> None:
        groups.belong("0::/jobs/7")
        groups.two("jobs/7", "max", 300)
        assert groups.room() is None
        groups.two("jobs", 5000, 4000)
        assert groups.room() == 1000

    def test_a_container_whose_group_is_the_mount(self, groups: Groups) -> None:
        groups.two("", 1000, 400)
        for path in ("/", "/only/the/host/knows"):
            groups.belong(f"0::{path}")
            assert groups.room() == 600

    def test_page_cache_that_is_given_up_is_no_use(self, groups: Groups) -> None:
        groups.belong("0::/a")
        groups.two("a", 1000, 900, "anon 100\ninactive_file 500\nactive_file 300\n")
        assert groups.room() == 600
        groups.two("a", 1000, 900, "anon 900\n\n")
        assert groups.room() == 100

    def test_more_use_than_the_limit_leaves_nothing(self, groups: Groups) -> None:
        groups.belong("0::/a")
        groups.two("a", 1000, 1200)
        assert groups.room() == 0


class TestVersion1:
    def test_the_memory_controller_counts(self, groups: Groups) -> None:
        groups.belong("4:memory:/jobs/7", "3:cpuset:/x", "0::/")
        groups.one("jobs/7", 1000, 300, "inactive_file 1\ntotal_inactive_file 50\n")
        groups.one("x", 10, 10)
        groups.one("", UNLIMITED_1, 10**9)
        assert groups.room() == 750

    def test_controllers_that_share_a_hierarchy(self, groups: Groups) -> None:
        groups.belong("4:cpu,memory:/a", "2:name=memory:/b")
        groups.one("a", 1000, 300)
        groups.one("b", 1000, 999)
        assert groups.room() == 700

    def test_no_limit_leaves_the_machine(
        self, groups: Groups, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        groups.belong("4:memory:/")
        groups.one("", UNLIMITED_1, 5000)
        monkeypatch.setattr(memory, "cgroup_room", lambda: groups.room())
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12345))
        assert available_bytes(torch.device("cpu")) == 12345


class TestAvailable:
    @pytest.mark.parametrize(("room", "found"), [(None, 1000), (400, 400), (4000, 1000), (0, 0)])
    def test_the_smaller_of_machine_and_groups(
        self, monkeypatch: pytest.MonkeyPatch, room: int | None, found: int
    ) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        monkeypatch.setattr(memory, "cgroup_room", lambda: room)
        assert available_bytes(torch.device("cpu")) == found

    def test_cuda_has_what_is_free_and_what_torch_does_not_use(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = torch.device("cuda", 1)
        figures = {"mem_get_info": (700, 2000), "memory_reserved": 500, "memory_allocated": 350}
        for name, figure in figures.items():
            monkeypatch.setattr(
                torch.cuda, name, lambda asked, figure=figure: figure if asked == device else None
            )
        assert available_bytes(device) == 700 + 150

    def test_without_control_groups(self, tmp_path: Path) -> None:
        assert cgroup_room(tmp_path / "none", tmp_path) is None

    def test_this_machine(self) -> None:
        assert 2**20 < available_bytes(torch.device("cpu")) < psutil.virtual_memory().total
