"""Rows that are held until they fill a row group, and those that a thread writes."""

from __future__ import annotations

import errno
import threading
import weakref
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lcray.errors import OutputError
from lcray.planning.plan import Span
from lcray.tables.schema import TABLES
from lcray.tables.shards.writer import ShardWriter
from lcray.tables.writing.row_groups import ElementsWriter, IntervalRows

SIZE = TABLES["units"].row_group_size
WAIT = 20  # seconds until a test gives up on a thread


def unit_rows(n: int, written: list[dict[str, Any]]) -> IntervalRows:
    fixed = {"layer": (np.arange(n) % 3, ["a", "b", "c"]), "unit": np.arange(n)}
    return IntervalRows("units", fixed, lambda table, columns: written.append(dict(columns)))


def test_rows_are_written_when_a_row_group_is_full() -> None:
    written: list[dict[str, Any]] = []
    n = SIZE // 3 + 1  # two intervals fit, three do not
    rows = unit_rows(n, written)
    for step in range(5):
        rows.add({"start_step": step}, {"lc": np.arange(n) + 0.5 * step})
        assert len(written) == step // 2
    rows.flush()
    rows.flush()
    assert [len(columns["lc"]) for columns in written] == [2 * n, 2 * n, n]
    assert max(len(columns["lc"]) for columns in written) <= SIZE
    joined = {key: np.concatenate([part[key] for part in written]) for key in ("lc", "start_step")}
    assert joined["start_step"].tolist() == [step for step in range(5) for _ in range(n)]
    assert (joined["lc"] == np.concatenate([np.arange(n) + 0.5 * s for s in range(5)])).all()
    codes, names = written[0]["layer"]
    assert names == ["a", "b", "c"] and (codes == np.tile(np.arange(n) % 3, 2)).all()
    assert (written[0]["unit"] == np.tile(np.arange(n), 2)).all()


def test_intervals_larger_than_a_row_group_are_not_held_together() -> None:
    written: list[dict[str, Any]] = []
    rows = unit_rows(SIZE + 1, written)
    for step in range(3):
        rows.add({"start_step": step}, {"lc": np.zeros(SIZE + 1)})
    rows.flush()
    assert [len(columns["lc"]) for columns in written] == [SIZE + 1] * 3


def test_nothing_is_written_where_intervals_have_no_rows() -> None:
    written: list[dict[str, Any]] = []
    rows = unit_rows(0, written)
    rows.add({"start_step": 0}, {"lc": np.zeros(0)})
    rows.flush()
    assert written == []


class Recorded:
    """Stands for a writer of shards: keeps the steps it is given, once it may."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.steps: list[int] = []
        self.threads: set[int] = set()
        self.fails = False

    def write(self, table: str, data: pa.Table) -> None:
        assert table == "elements"
        assert self.open.wait(WAIT)
        self.threads.add(threading.get_ident())
        if self.fails:
            raise OutputError("elements: no space left; make room")
        self.steps.append(data.column("start_step")[0].as_py())


def values(n: int) -> torch.Tensor:
    return torch.linspace(-1, 1, n)


def test_elements_are_written_in_order_by_one_other_thread(tmp_path: Path) -> None:
    span = Span((0, 1, 2, 3))
    with ShardWriter(tmp_path, span, "a") as writer:
        with ElementsWriter(writer) as elements:
            for step in range(3):
                for split in ("train", "val"):
                    elements.put(split, step, [("a", 0, values(5)), ("b", 3, values(2) + step)])
            elements.drain()
        assert writer.commit(checkpoints={}, info={})
    (path,) = writer.folder.glob("elements-*.parquet")
    assert pq.read_table(path).to_pylist() == [
        {"split": split, "layer": layer, "start_step": step, "index": index, "lc": lc}
        for step in range(3)
        for split in ("train", "val")
        for layer, index, lc in (
            *(("a", i, lc) for i, lc in enumerate(values(5).tolist())),
            ("b", 3, -1.0 + step),
            ("b", 4, 1.0 + step),
        )
    ]


def test_one_thread_writes_and_at_most_three_pieces_are_in_memory() -> None:
    recorded = Recorded()
    recorded.open.clear()
    alive: list[weakref.ref[Any]] = []
    elements = ElementsWriter(recorded)  # type: ignore[arg-type]

    def fill() -> None:
        for step in range(8):
            piece = values(100)
            alive.append(weakref.ref(piece))
            elements.put("train", step, [("a", 0, piece)])

    filling = threading.Thread(target=fill)
    filling.start()
    filling.join(0.5)  # it cannot get further while nothing is written
    assert filling.is_alive()
    assert len(alive) <= 4  # one in the works, two waiting, one in the hands of who waits
    recorded.open.set()
    filling.join(WAIT)
    elements.drain()
    elements.close()
    assert recorded.steps == list(range(8))
    assert len(recorded.threads) == 1 and threading.get_ident() not in recorded.threads
    assert [piece for piece in alive if piece() is not None] == []


@pytest.mark.parametrize("late", [False, True])
def test_what_the_disk_refuses_is_raised_by_the_next_call(late: bool) -> None:
    recorded = Recorded()
    recorded.fails = True
    with ElementsWriter(recorded) as elements:  # type: ignore[arg-type]
        elements.put("train", 0, [("a", 0, values(3))])
        if late:
            with pytest.raises(OutputError, match="no space left"):
                elements.drain()
            return
        _finish(elements)
        with pytest.raises(OutputError, match="no space left"):
            elements.put("train", 1, [("a", 0, values(3))])


def _finish(elements: ElementsWriter) -> None:
    """Wait until the thread has nothing to do, without taking its errors."""
    elements._thread.submit(int).result(WAIT)


def test_leaving_drops_what_waits_and_ends_the_thread(tmp_path: Path) -> None:
    span = Span((0, 1))
    before = threading.active_count()
    with (
        pytest.raises(OSError, match="power"),
        ShardWriter(tmp_path, span, "a") as writer,
        ElementsWriter(writer) as elements,
    ):
        for step in range(3):
            elements.put("train", step, [("a", 0, values(1000))])
        raise OSError(errno.EIO, "power")
    assert threading.active_count() == before
    assert list(writer.folder.iterdir()) == []


def test_what_waits_is_not_written_after_leaving() -> None:
    recorded = Recorded()
    recorded.open.clear()
    elements = ElementsWriter(recorded)  # type: ignore[arg-type]
    for step in range(3):
        elements.put("train", step, [("a", 0, values(3))])
    waiting = list(elements._pending)[1:]
    closing = threading.Thread(target=elements.close)
    closing.start()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(WAIT)
    recorded.open.set()
    closing.join(WAIT)
    assert recorded.steps == [0]


def test_no_thread_is_started_for_nothing() -> None:
    before = threading.active_count()
    with ElementsWriter(Recorded()) as elements:  # type: ignore[arg-type]
        elements.drain()
        assert threading.active_count() == before
