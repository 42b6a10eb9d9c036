"""SQL of other people: each attack against the real DuckDB, and the file system looked at after."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import planting
import pytest
import scenes
from repository import TESTS

from lcray.errors import CorruptionError, UsageError
from lcray.storage.lock import LOCK
from lcray.tables.reading.duckdb import connect, query_room, select, shut
from lcray.tables.reading.results import open_output
from lcray.tables.reducing.reduce import reduce
from lcray.tables.verifying.verify import verify

WORLD = planting.make_world(spans=((0, 2, 4),))
SECRET = "the contents of a file that is no table"
global_frame = pd.DataFrame({"a": [1]})  # no table for a replacement scan


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out`, and beside it what must stay out of reach: a file, a Parquet file, a database."""
    home = tmp_path_factory.mktemp("sandbox")
    planting.write_reduced(home / "out", WORLD)
    outside = home / "out" / "tables-of-others"  # begins as the folder that is allowed
    outside.mkdir()
    for folder in (home, outside):
        (folder / "secret.txt").write_text(SECRET)
        (folder / "secret.parquet").write_bytes((home / "out/tables/layers.parquet").read_bytes())
    with duckdb.connect(str(home / "secret.db")) as database:
        database.execute("CREATE TABLE t AS SELECT 1 AS i")
    os.symlink(home / "secret.txt", home / "out" / "tables" / "link.txt")
    os.symlink(home, home / "out" / "tables" / "linked")
    return home


@pytest.fixture(scope="module")
def requests() -> Iterator[list[str]]:
    """The paths that a web server on this machine was asked for; the port is the first."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        asked.append(str(server.server_port))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield asked
        server.shutdown()


READERS = (
    "read_text",
    "read_blob",
    "read_csv",
    "read_csv_auto",
    "sniff_csv",
    "read_json",
    "read_json_objects",
    "read_ndjson",
    "read_parquet",
    "parquet_scan",
    "parquet_metadata",
    "parquet_schema",
    "parquet_kv_metadata",
    "parquet_file_metadata",
    "glob",
)
PLACES = (
    "/etc/passwd",
    "/proc/self/environ",
    "{home}/secret.txt",
    "{home}/secret.parquet",
    "{home}/*",
    "file://{home}/secret.parquet",
    "{out}/analysis.json",
    "{out}/tables/../../secret.txt",
    "{out}/tables/../../secret.parquet",
    "{out}/tables/link.txt",
    "{out}/tables/linked/secret.parquet",
    "{out}/tables-of-others/secret.parquet",
    "{out}/tables/*/secret.parquet",
    "{out}/tables/manifest.json",
    "{out}/tables/*",
    "http://127.0.0.1:{port}/x.parquet",
    "https://127.0.0.1:{port}/x.parquet",
    "s3://bucket/x.parquet",
)
STATEMENTS = (
    "COPY layers TO '{out}/tables/x.csv'",
    "COPY layers TO '{out}/tables/layers.parquet' (FORMAT parquet)",
    "COPY (SELECT 1) TO '{home}/x.csv'",
    "COPY (SELECT 1) TO '{out}/tables/p' (FORMAT parquet, PARTITION_BY (a))",
    "COPY FROM DATABASE memory TO x",
    "ATTACH '{home}/secret.db' AS s",
    "ATTACH '{out}/tables/x.db'",
    "ATTACH ':memory:' AS other",
    "DETACH memory",
    "USE memory",
    "EXPORT DATABASE '{out}/tables/x'",
    "IMPORT DATABASE '{out}/tables'",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE COPY layers TO '{out}/tables/x.csv'",
    "EXPLAIN ANALYZE ATTACH '{out}/tables/x.db'",
    "PRAGMA database_list",
    "PRAGMA enable_profiling='json'",
    "PRAGMA profile_output='{out}/tables/x.json'",
    "PRAGMA temp_directory='{out}/tables'",
    "PRAGMA threads=1000",
    "SET threads=1000",
    "SET memory_limit='1TB'",
    "SET temp_directory='{out}/tables'",
    "SET enable_external_access=true",
    "SET allowed_directories=['/']",
    "SET profiling_output='{out}/tables/x.json'",
    "SET GLOBAL lock_configuration=false",
    "RESET memory_limit",
    "INSTALL httpfs",
    "FORCE INSTALL json FROM community",
    "UPDATE EXTENSIONS",
    "LOAD httpfs",
    "LOAD '{home}/evil.duckdb_extension'",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW layers AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "CREATE SECRET (TYPE s3, KEY_ID 'x')",
    "CREATE PERSISTENT SECRET s (TYPE s3)",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "BEGIN",
    "CHECKPOINT",
    "VACUUM",
    "CALL pragma_version()",
    "CALL enable_logging(storage='file', storage_path='{out}/tables')",
    "SELECT 1; COPY layers TO '{out}/tables/x.csv'",
    "COPY layers TO '{out}/tables/x.csv'; SELECT 1",
    "/* SELECT */ COPY layers TO '{out}/tables/x.csv' -- SELECT",
    "WITH x AS (COPY layers TO '{out}/tables/x.csv') SELECT 1",
    "WITH x AS (COPY layers TO '{out}/tables/layers.parquet') SELECT * FROM x",
    "WITH x AS (COPY layers TO '{out}/tables/layers.parquet' (USE_TMP_FILE false)) SELECT 1",
    "WITH x AS MATERIALIZED (COPY (SELECT 1) TO '{out}/tables/units.parquet' "
    "(FORMAT csv, USE_TMP_FILE false)) SELECT * FROM x LIMIT 0",
    "SELECT * FROM (WITH x AS (COPY (SELECT 1) TO '{out}/tables/units.parquet' "
    "(FORMAT csv, USE_TMP_FILE false)) SELECT 1)",
    "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''{out}/tables/units.parquet'' "
    "(FORMAT csv, USE_TMP_FILE false)) SELECT 1')",
    "WITH x AS (DELETE FROM layers RETURNING *) SELECT * FROM x",
    "SELECT * FROM (COPY layers TO '{out}/tables/x.csv')",
    "SELECT 1 INTO x",
    "SELECT * FROM query('COPY layers TO ''{out}/tables/x.csv''')",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT * FROM query_table('{home}/secret.parquet')",
    "SELECT * FROM '{home}/secret.parquet'",
    "FROM '{home}/secret.txt'",
    'SELECT * FROM "{home}/secret.db".t',
    "SELECT * FROM read_duckdb('{home}/secret.db')",
    "SELECT * FROM sqlite_scan('{home}/secret.db', 't')",
    "SELECT * FROM global_frame",
    "SELECT * FROM local_frame",
    "SELECT * FROM results",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM arrow_scan(1, 1, 1)",
    "SELECT * FROM arrow_scan_dumb(0, 0, 0)",
    "SELECT * FROM arrow_scan(1::POINTER, 1::POINTER, 1::POINTER)",
    "SELECT * FROM python_map_function(1)",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM enable_logging(storage='file', storage_path='{out}/tables')",
    "SELECT * FROM force_checkpoint()",
    "SELECT * FROM load_aws_credentials()",
)
READS = tuple(f"SELECT * FROM {reader}('{place}')" for reader in READERS for place in PLACES)


def tree(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Every file and link there, with its size and time."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*") if folder.is_dir() else ():
            state = path.lstat()
            found[path] = state.st_size, state.st_mtime_ns
    return found


@pytest.mark.parametrize("attack", [*STATEMENTS, *READS])
def test_sql_reaches_nothing_else(home: Path, requests: list[str], attack: str) -> None:
    results = open_output(home / "out")
    local_frame = pd.DataFrame({"a": [1]})
    watched = (home, Path.home() / ".duckdb", Path.cwd() / "tests")
    before = tree(*watched)
    places = {"home": home, "out": home / "out", "port": requests[0]}
    for name, value in places.items():
        attack = attack.replace("{" + name + "}", str(value))
    del requests[1:]
    try:
        found = results.sql(attack)
    except UsageError as error:
        assert str(error).startswith("SQL: ")
        assert SECRET not in str(error)
    else:  # an empty answer is no answer: a pattern that matches nothing within the tables
        assert found.empty, found
    assert tree(*watched) == before
    assert requests[1:] == []
    assert len(local_frame) == 1


def test_the_tables_themselves_are_read(home: Path) -> None:
    """The attacks above fail for the reason that they should."""
    results = open_output(home / "out")
    path = f"{home}/out/tables/layers.parquet"
    assert len(results.sql(f"SELECT * FROM read_parquet('{path}')")) == len(results.layers())
    with duckdb.connect() as free:
        for place in ("secret.txt", "out/tables/link.txt"):
            assert free.sql(f"SELECT content FROM read_text('{home}/{place}')").fetchall() == [
                (SECRET,)
            ]


@pytest.mark.parametrize("linked", ["tables/layers.parquet", "tables", "analysis.json"])
def test_a_table_that_is_a_link_to_elsewhere(tmp_path: Path, linked: str) -> None:
    out = planting.write_reduced(tmp_path / "out", WORLD)
    (out / linked).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", out / linked)
    before = tree(tmp_path)
    for read in (
        lambda: open_output(out).layers(),
        lambda: open_output(out).sql("SELECT * FROM layers"),
        lambda: reduce(out) if linked != "tables/layers.parquet" else open_output(out).layers(),
    ):
        with pytest.raises(CorruptionError, match="a link leads out of"):
            read()
    assert any("a link leads out of" in problem for problem in verify(out).problems)
    shutil.rmtree(out / LOCK, ignore_errors=True)
    before = {path: state for path, state in before.items() if LOCK not in path.parts}
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in after if path.is_file())


def test_verification_runs_confined(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Should anything of a plan ever reach the SQL of the invariants, it reaches no file."""
    from lcray.tables.verifying.coverage import Invariant

    reaching = f"SELECT content FROM read_text('{home}/secret.txt')"
    writing = f"COPY (SELECT 1) TO '{tmp_path}/x.csv'"
    hostile = [Invariant(name, (), name) for name in (reaching, writing)]
    monkeypatch.setattr("lcray.tables.verifying.verify.invariants", lambda plan: hostile)
    problems = verify(home / "out").problems
    assert len(problems) == 2 and all("cannot be checked" in p for p in problems)
    assert not any(SECRET in p for p in problems) and not list(tmp_path.iterdir())


def test_a_large_join_of_verify_goes_to_its_own_folder(tmp_path: Path) -> None:
    with connect(50 << 20) as database:
        database.execute(f"SET temp_directory='{tmp_path}'")
        shut(database, [])
        query = "SELECT count(*) FROM (SELECT DISTINCT hash(i) FROM range(5000000) t(i))"
        assert database.execute(query).fetchall() == [(5_000_000,)]


HUNGRY = (
    "SELECT * FROM range(100000000000)",
    "SELECT list(i) FROM range(100000000000) t(i)",
    "SELECT count(*) FROM (SELECT DISTINCT i FROM range(100000000000) t(i))",
    "SELECT range(100000000000)",
    "SELECT repeat(repeat('x', 100000), 100000)",
    "SELECT string_agg(repeat('x', 1000), '') FROM range(100000000000)",
    "SELECT * FROM layers a, layers b, layers c, layers d, layers e, layers f ORDER BY ALL",
)
LIMITED = """
import sys
import lcray, lcray.tables.reading.results
from benchmarks.peaks import peak_bytes
from lcray.errors import UsageError

lcray.tables.reading.results.query_room = lambda: 256 << 20
out = lcray.open(sys.argv[1])
out.sql("SELECT 1")
try:
    out.sql(sys.argv[2])
except UsageError as error:
    assert str(error).startswith("SQL: ") and chr(10) not in str(error), error
    print(peak_bytes() >> 20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("query", HUNGRY)
def test_sql_takes_no_more_memory_than_it_may(home: Path, query: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(home / "out"), query]
    environment = scenes.python_environment() | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert int(done.stdout) < 1500  # MiB: Python with torch takes about 400 of them


def test_a_query_may_take_half_of_what_is_left() -> None:
    import psutil

    room = query_room()
    assert 1 << 28 <= room <= max(1 << 28, psutil.virtual_memory().total // 2)


@pytest.mark.parametrize(("left", "room"), [(6 << 30, 3 << 30), (1 << 20, 1 << 28)])
def test_of_what_is_left_a_query_may_take_half(
    left: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcray.tables.reading.duckdb.available_bytes", lambda device: left)
    assert query_room() == room


def test_a_database_takes_no_more_than_its_room() -> None:
    with connect(64 << 20) as connection, pytest.raises(duckdb.OutOfMemoryException):
        connection.execute("SELECT list(i) FROM range(20000000) t(i)")


def test_an_answer_has_its_own_room() -> None:
    """Integers of eight bytes, a hundred thousand of them."""
    with connect(1 << 28) as connection:
        query = "SELECT * FROM range(100000)"
        assert select(connection, query, 1 << 20).num_rows == 100_000
        with pytest.raises(UsageError, match="larger than 0 MiB"):
            select(connection, query, 790_000)


def test_an_answer_may_take_half_of_the_room(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcray.tables.reading.results.query_room", lambda: 64 << 20)
    out = open_output(home / "out")
    with pytest.raises(UsageError, match=r"^SQL: the answer is larger than 32 MiB"):
        out.sql_arrow("SELECT * FROM range(5000000)")  # 40 MB


@pytest.mark.parametrize(
    "setting",
    [
        "autoinstall_known_extensions",
        "autoload_known_extensions",
        "allow_community_extensions",
        "python_enable_replacements",
        "python_scan_all_frames",
    ],
)
def test_a_database_finds_and_loads_nothing_even_before_it_is_shut(setting: str) -> None:
    local_frame = pd.DataFrame({"a": [1]})
    with connect(1 << 28) as connection:
        asked = f"SELECT current_setting('{setting}')"
        assert connection.execute(asked).fetchall() == [(False,)]
        for frame in ("local_frame", "global_frame"):
            with pytest.raises(duckdb.CatalogException, match=f"{frame} does not exist"):
                connection.execute(f"SELECT * FROM {frame}")
        with pytest.raises(duckdb.Error, match="requires the extension httpfs to be loaded"):
            connection.execute("SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')")
    assert len(local_frame) == 1


def test_nothing_is_outside_once_it_is_shut(tmp_path: Path) -> None:
    """By each setting alone: the statements here are those that `select` would refuse as well."""
    with connect(1 << 28) as connection:
        shut(connection, [tmp_path / "x.parquet"])
        for statement in (
            f"COPY (SELECT 1) TO '{tmp_path}/y.csv'",
            f"ATTACH '{tmp_path}/z.db'",
            "SELECT * FROM read_text('/etc/passwd')",
            "LOAD httpfs",
        ):
            with pytest.raises(duckdb.PermissionException):
                connection.execute(statement)
        connection.execute(f"COPY (SELECT 1 AS i) TO '{tmp_path}/x.parquet'")
        assert connection.execute(f"SELECT i FROM '{tmp_path}/x.parquet'").fetchall() == [(1,)]
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_a_query_that_needs_more_leaves_no_files_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB would put them into a folder of where the process is."""
    monkeypatch.chdir(tmp_path)
    query = "SELECT count(*) FROM (SELECT DISTINCT hash(i) FROM range(5000000) t(i))"
    with connect(50 << 20) as database:
        shut(database, [])
        with pytest.raises(duckdb.OutOfMemoryException):
            database.execute(query)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_of_statement_without_a_name_is_no_select() -> None:
    """Refused by its kind, before DuckDB is asked to explain it."""
    query = "UPDATE EXTENSIONS"
    with connect(1 << 28) as connection:
        with pytest.raises(ValueError, match="StatementType"):
            connection.extract_statements(query)[0].type  # noqa: B018 - asked for its error
        with pytest.raises(UsageError, match="give exactly one SELECT"):
            select(connection, query, 1 << 20)


def test_what_is_shut_stays_shut(tmp_path: Path) -> None:
    with connect(1 << 28) as connection:
        shut(connection, [tmp_path / "x.parquet"])
        for setting in ("memory_limit='64GB'", "python_enable_replacements=true", "threads=99"):
            with pytest.raises(duckdb.Error, match="configuration has been locked"):
                connection.execute(f"SET {setting}")
