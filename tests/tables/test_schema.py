from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lcray.errors import UsageError
from lcray.storage.files import FORMAT_VERSION
from lcray.tables.arrow import make_table
from lcray.tables.schema import TABLES, table_schema

# The table of tables of the design: key, then the other columns.
DESIGN = {
    "intervals": "split start_step | end_step loss_start loss_end loss_change lc lc_se gap "
    "first_order_lc rule panels n_gradients gradient_cost converged status n_helping n_hurting "
    "n_zero",
    "layers": "split start_step layer | end_step module kind numel lc lc_error lc_se "
    "lc_helping lc_hurting n_helping n_hurting n_zero first_order_lc update_norm gradient_norm "
    "n_flips",
    "units": "split start_step layer unit | lc",
    "groups": "split start_step layer group | lc weight",
    "replicates": "split start_step replicate | end_step loss_start loss_end loss_change lc weight",
    "replicate_layers": "split start_step layer replicate | lc weight",
    "histograms": "split window layer sign bin | lower upper count sum",
    "parameters": "split layer index | lc abs_lc n_helping n_hurting n_zero n_flips displacement "
    "path_length displacement_flips gradient_flips",
    "traces": "split layer index step | weight gradient lc",
    "elements": "split layer start_step index | lc",
    "fisher": "split step layer | trace_true trace_true_se trace_empirical trace_empirical_se "
    "n_items seed",
    "fits": "split window layer sign distribution parameter | value se",
    "borders": "split layer index | lc_first lc_last displacement_first displacement_last "
    "gradient_first gradient_last",
}


def test_tables_are_those_of_the_design() -> None:
    assert set(TABLES) == set(DESIGN)
    for name, columns in DESIGN.items():
        key, _, rest = columns.partition("|")
        assert TABLES[name].key == tuple(key.split())
        assert TABLES[name].schema.names == [*key.split(), *rest.split()]


@pytest.mark.parametrize("name", TABLES)
def test_types_units_and_descriptions(name: str) -> None:
    table = TABLES[name]
    metadata = table.schema.metadata
    assert metadata[b"lcray.format_version"] == str(FORMAT_VERSION).encode()
    assert metadata[b"lcray.table"] == name.encode()
    assert metadata[b"lcray.key"].decode().split(",") == list(table.key)
    string = pa.dictionary(pa.int32(), pa.string())
    strings = ["split", "layer", "module", "kind", "rule", "status", "distribution", "parameter"]
    for field in table.schema:
        assert field.metadata[b"description"]
        assert b"unit" in field.metadata
        assert (field.type == string) == (field.name in strings)
        assert not (field.name in table.key and field.nullable)
        if pa.types.is_floating(field.type):
            single = (name, field.name) == ("elements", "lc")
            assert field.type == (pa.float32() if single else pa.float64())
        elif field.name == "sign" or (name == "borders" and field.name not in table.key):
            assert field.type == pa.int8()
        elif field.type not in (string, pa.bool_()):
            assert field.type == pa.int64()


def filled(name: str, rows: int) -> pa.Table:
    """A table with some value in every column."""
    values: dict[str, object] = {}
    for field in TABLES[name].schema:
        if pa.types.is_dictionary(field.type):
            values[field.name] = (np.arange(rows) % 2, ["first", "second"])
        elif pa.types.is_boolean(field.type):
            values[field.name] = True
        else:
            values[field.name] = np.arange(rows) % 100
    return make_table(name, values)


@pytest.mark.parametrize("name", TABLES)
def test_parquet_gives_the_same_table_back(name: str) -> None:
    table = filled(name, 50)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **TABLES[name].write_options) as writer:
        writer.write_table(table)
    file = pq.ParquetFile(io.BytesIO(sink.getvalue()))
    assert file.read().equals(table)
    assert file.schema_arrow.equals(TABLES[name].schema)
    assert file.schema_arrow.metadata[b"lcray.format_version"] == b"2"
    for at, field in enumerate(table.schema):
        column = file.metadata.row_group(0).column(at)
        assert column.compression == "ZSTD"
        if pa.types.is_floating(field.type):
            assert "BYTE_STREAM_SPLIT" in column.encodings
        elif pa.types.is_integer(field.type):
            assert "DELTA_BINARY_PACKED" in column.encodings
        elif pa.types.is_dictionary(field.type):
            assert column.has_dictionary_page


BORDER = {"split": "s", "layer": "a", "lc_first": 1, "lc_last": -1}
BORDER |= {"displacement_first": 0, "displacement_last": 0}


def test_scalars_are_repeated_and_left_out_columns_are_null() -> None:
    table = make_table("borders", BORDER | {"index": np.arange(3)})
    assert table.to_pylist()[2] == BORDER | {
        "index": 2,
        "gradient_first": None,
        "gradient_last": None,
    }
    assert table.num_rows == 3


def test_only_scalars_make_one_row_and_empty_columns_none() -> None:
    unit = {"split": "s", "layer": "a", "start_step": 0, "unit": 0, "lc": 1.0}
    assert make_table("units", unit).num_rows == 1
    assert make_table("units", unit | {"lc": []}).num_rows == 0


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.5, np.nan, np.inf, -np.inf]),
        [1.5, None, float("nan"), float("inf")],
        pa.array([1.5, None, float("nan"), float("inf")]),
        pa.chunked_array([[1.5, None], [float("nan"), float("inf")]]),
    ],
)
def test_numbers_that_are_not_finite_become_null(values: object) -> None:
    table = make_table(
        "units", {"split": "s", "layer": "a", "start_step": 0, "unit": [0, 1, 2, 3], "lc": values}
    )
    assert table.column("lc").to_pylist() == [1.5, None, None, None]


def test_beyond_float32_is_null() -> None:
    columns = {"split": "s", "layer": "a", "start_step": 0, "index": [0, 1]}
    table = make_table("elements", columns | {"lc": np.array([1e39, 0.1])})
    assert table.column("lc").to_pylist() == [None, float(np.float32(0.1))]


@pytest.mark.parametrize(
    "strings",
    [
        ["b", "a", "b"],
        np.array(["b", "a", "b"], object),
        (np.array([1, 0, 1]), ["a", "b"]),
        pa.array(["b", "a", "b"]),
        pa.array(["b", "a", "b"]).dictionary_encode(),
        pa.chunked_array([["b"], ["a", "b"]]),
    ],
)
def test_strings_come_in_many_forms(strings: object) -> None:
    columns = {"split": "s", "start_step": 0, "unit": [0, 1, 2], "lc": 0.0}
    table = make_table("units", columns | {"layer": strings})
    assert table.column("layer").to_pylist() == ["b", "a", "b"]
    assert table.schema.equals(TABLES["units"].schema)


def test_integers_come_in_many_forms() -> None:
    columns = {"split": "s", "layer": "a", "start_step": pa.chunked_array([[0], [1]])}
    columns |= {"unit": pa.array([0, 1], pa.int16()), "lc": 0.0}
    table = make_table("units", columns)
    assert table.column("start_step").to_pylist() == table.column("unit").to_pylist() == [0, 1]


UNIT = {"split": "s", "layer": "a", "start_step": 0, "unit": [0, 1], "lc": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": [0, 1]}, "did you mean 'unit'"),
        ({"unit": None}, "'unit' must not be missing"),
        ({"unit": [0, None]}, "'unit' must not be missing or null"),
        ({"unit": [0.5, 1.0]}, "'unit'"),
        ({"unit": np.array([0.5, 1.0])}, "'unit'"),
        ({"lc": [0.0, 0.0, 0.0]}, "differ in length"),
        ({"lc": ["x", "y"]}, "'lc'"),
        ({"layer": (np.array([0, 2]), ["a", "b"])}, "'layer'"),
        ({"layer": (np.array([0, -1]), ["a", "b"])}, "'layer'"),
    ],
)
def test_columns_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_table("units", UNIT | change)
    assert "\n" not in str(caught.value)


def test_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'layers'"):
        table_schema("layer")
    with pytest.raises(UsageError):
        make_table("unit", {})
