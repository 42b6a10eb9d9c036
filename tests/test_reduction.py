from __future__ import annotations

import dataclasses
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import output_factory as factory
import pytest

from lcray import merging, reduction
from lcray.distributions import fit_weibull
from lcray.errors import CorruptionError, IncompleteError, OutputError
from lcray.planning import Span
from lcray.reduction import name_intervals, reduce, repack
from lcray.schema import TABLES
from lcray.shards import span_folder
from lcray.summary import bin_edges


REDUCED = [t for t in factory.ALL if t != "borders"]


def read(out: Path, table: str) -> pa.Table:
    return pq.ParquetFile(out / "tables" / f"{table}.parquet").read()


def assert_same(actual: pa.Table, expected: factory.Rows, table: str) -> None:
    """Same rows in the same order; floats to 1e-12, everything else exactly."""
    schema = TABLES[table].schema
    assert actual.schema.equals(schema)
    rows = actual.to_pylist()
    assert len(rows) == len(expected)
    for got, want in zip(rows, expected, strict=True):
        for field in schema:
            a, b = got[field.name], want.get(field.name)
            if pa.types.is_floating(field.type) and b is not None and a is not None:
                assert a == pytest.approx(b, rel=1e-12, abs=1e-15), (field.name, got)
            else:
                assert a == b, (field.name, got, want)


WORLDS = {
    "plain": {},
    "one span": {"spans": ((0, 2, 4, 6, 8, 10, 12),)},
    "a span an interval": {"spans": tuple((i, i + 2) for i in range(0, 12, 2))},
    "no node at 0": {"has_left": False},
    "bad interval at a border": {"bad": {("val", 6): "nonfinite_loss"}},
    "bad interval": {"bad": {("train", 2): "nonfinite_gradient", ("val", 10): "nonfinite_loss"}},
    "window across all": {"window": 100},
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("block", [7, merging.BLOCK])
def test_tables_are_those_of_one_span(
    tmp_path: Path, name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging.Source, "__init__", _with_block(block))
    world = factory.make_world(**WORLDS[name])
    out = factory.write_output(tmp_path / "out", world)
    result = reduce(out)
    assert result.missing == ()
    for table in REDUCED:
        expected = factory.whole(world, table)
        assert_same(read(out, table), expected, table)
        assert result.rows[table] == len(expected)


def _with_block(block: int):
    """Source with blocks so small that layers are cut and streamed."""
    make = merging.Source.__init__

    def init(self, out, plan, commits):
        make(self, out, plan, commits, block)

    return init
