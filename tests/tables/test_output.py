"""An output has one reader of each of its files: what one verb refuses, all do, in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenes

import lcray
from lcray.errors import CorruptionError, LcrayError, OutputError
from lcray.planning.plan import Plan
from lcray.storage.files import encode_json, read_json, read_sealed, seal
from lcray.tables.output import OWN, Output

OPTIONS = {"span_length": 3, "elements": True}
ANALYSIS, MANIFEST = "analysis.json", "tables/manifest.json"


@pytest.fixture
def out(plain_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_out, tmp_path / "out"))


class Verbs:
    """Each on `out`, by its name."""

    def __init__(self, out: Path, run: Path, folder: Path) -> None:
        self.out, self.run, self.folder = out, run, folder

    def open(self) -> Any:
        return lcray.open(self.out)

    def query(self) -> Any:
        return lcray.query(self.out, "SELECT 1")

    def findings(self) -> Any:
        return lcray.findings(self.out, only=["shares"])

    def report(self) -> Any:
        return lcray.report(self.out)

    def export(self) -> Any:
        return lcray.export(self.out, "csv", self.folder / "csv")

    def trace(self) -> Any:
        return lcray.trace(self.run, "scenes:plain", self.out, elements=["0.weight:0"])

    def status(self) -> Any:
        return lcray.status(self.out)

    def reduce(self) -> Any:
        return lcray.reduce(self.out)

    def analyze(self) -> Any:
        return lcray.analyze(self.run, "scenes:plain", self.out, **OPTIONS)

    def verify(self) -> Any:
        problems = lcray.verify(self.out).problems
        if problems:
            raise Problem(problems)


class Problem(Exception):
    """What `verify`, which raises nothing, has found."""


READERS = ("open", "query", "findings", "report", "export", "trace")
COUNTERS = ("status", "reduce", "analyze")


def refusals(verbs: Verbs, names: tuple[str, ...]) -> dict[str, tuple[type, str]]:
    """What each verb says; what `verify` finds must have the line among it."""
    found = {}
    for name in names:
        with pytest.raises(LcrayError) as caught:
            getattr(verbs, name)()
        found[name] = (caught.type, str(caught.value))
    with pytest.raises(Problem) as problem:
        verbs.verify()
    (line,) = {line for _, line in found.values()}
    assert line in problem.value.args[0]
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = False) -> None:
    data = read_sealed(path) if sealed else read_json(path)
    change(data)
    path.write_bytes(encode_json(seal(data) if sealed else data))


def elsewhere(path: Path) -> None:
    outside = next(above for above in path.parents if above.name == "out").with_name("elsewhere")
    path.rename(outside)
    path.symlink_to(outside)


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def put(*keys: str, value: Any = None) -> Callable[[Path], Any]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return lambda path: edit(path, change, sealed=path.name != ANALYSIS)


def drop(key: str) -> Callable[[Path], Any]:
    return lambda path: edit(path, lambda data: data.pop(key), sealed=path.name != ANALYSIS)


ANYWHERE: dict[str, tuple[Callable[[Path], Any], type, str]] = {
    "a link": (elsewhere, CorruptionError, "a link leads out of .*; put the real file or folder"),
    "no JSON": (text("{"), CorruptionError, "not valid JSON; restore it"),
    "no object": (text("[]"), CorruptionError, "not a JSON object; restore it"),
    "another version": (
        put("format_version", value=9),
        OutputError,
        "format version 9, this lcray ",
    ),
}
HOLDS_NONE = (
    r"not valid: it holds no valid plan and record \(.*\); "
    r"restore it, or analyze into a new output$"
)
OF_THE_RECORD = {
    name: (make, CorruptionError, HOLDS_NONE)
    for name, make in {
        "no plan": drop("plan"),
        "no version": drop("format_version"),
        "no run": drop("run"),
        "notes that are none": put("notes", value=3),
        "a plan that is none": put("plan", value=[]),
        "a plan of nonsense": put("plan", "window", value=0),
        "a plan of another rule": put("plan", "settings", "rule", value="simpsom"),
        "versions that are none": put("versions", value={"python": 3}),
    }.items()
}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("damage", [*ANYWHERE, *OF_THE_RECORD])
def test_analysis_json_is_read_alike_by_all(
    damage: str, out: Path, plain_run: Path, tmp_path: Path
) -> None:
    path = out / ANALYSIS
    make, kind, line = (ANYWHERE | OF_THE_RECORD)[damage]
    make(path)
    for said in refusals(Verbs(out, plain_run, tmp_path), READERS + COUNTERS).values():
        check(said, path, kind, line)


def check(said: tuple[type, str], path: Path, kind: type, line: str) -> None:
    assert said[0] is kind
    assert said[1].startswith(f"{path}: ") and "\n" not in said[1]
    assert re.search(line, said[1]), said[1]


@pytest.mark.usefixtures("inline")
def test_without_analysis_json(out: Path, plain_run: Path, tmp_path: Path) -> None:
    """Only `analyze` may make one, and not among what is no output."""
    path, verbs = out / ANALYSIS, Verbs(out, plain_run, tmp_path)
    path.unlink()
    for said in refusals(verbs, (*READERS, "status", "reduce")).values():
        check(said, path, OutputError, r"no such file; is this the output of an analysis\?")
    with pytest.raises(OutputError, match="not empty, and no output of lcray; choose another"):
        verbs.analyze()


OF_TABLES = {
    "no tables": (drop("tables"), CorruptionError, "not a manifest; run lcray reduce"),
    "tables of other names": (put("tables", "x", value={}), CorruptionError, "; run lcray reduce"),
    "spans that are none": (put("spans", value=3), CorruptionError, "not a manifest; run lcray"),
}


@pytest.mark.parametrize("damage", [*ANYWHERE, *OF_TABLES])
@pytest.mark.usefixtures("inline")
def test_the_manifest_is_read_alike_by_all(
    damage: str, out: Path, plain_run: Path, tmp_path: Path
) -> None:
    path = out / MANIFEST
    make, kind, line = (ANYWHERE | OF_TABLES)[damage]
    make(path)
    for said in refusals(Verbs(out, plain_run, tmp_path), READERS).values():
        check(said, path, kind, line)


OF_SPANS = {
    "no files": (
        drop("files"),
        CorruptionError,
        "not a valid commit .*; remove its folder and run",
    ),
    "other steps": (put("span", value=[0, 1]), OutputError, "are not those of the plan; analyze"),
    "another checksum": (
        lambda path: edit(path, lambda data: data.__setitem__("attempt", "x")),
        CorruptionError,
        "differs from its own checksum; restore it, or remove its folder",
    ),
}


@pytest.mark.parametrize("damage", [*ANYWHERE, *OF_SPANS])
@pytest.mark.usefixtures("inline")
def test_commits_are_read_alike_by_all(
    damage: str, out: Path, plain_run: Path, tmp_path: Path
) -> None:
    path = out / "shards" / scenes.spans_of(out)[1] / "commit.json"
    make, kind, line = (ANYWHERE | OF_SPANS)[damage]
    make(path)
    for said in refusals(Verbs(out, plain_run, tmp_path), COUNTERS).values():
        check(said, path, kind, line)


@pytest.mark.usefixtures("inline")
def test_a_resume_parses_the_plan_once_and_so_does_who_reduces(
    out: Path, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver and the worker that makes the tables, which is of a process of its own."""
    parsed, parse = [], Plan.from_dict
    monkeypatch.setattr(Plan, "from_dict", lambda data: parsed.append(1) or parse(data))
    lcray.analyze(plain_run, "scenes:plain", out, **OPTIONS)
    assert len(parsed) == 2
    for name in (*READERS[:-1], "status", "reduce", "verify"):
        parsed.clear()
        getattr(Verbs(out, plain_run, tmp_path), name)()
        assert len(parsed) == 1, name


def test_a_record_that_has_changed_is_parsed_anew(out: Path) -> None:
    output = Output(out)
    before = output.record()
    assert output.record() is before
    put("notes", value=["new"])(out / ANALYSIS)
    assert output.record().notes == ("new",)
    output.write(before)
    assert output.record() == before


def test_every_path_is_confined(out: Path, tmp_path: Path) -> None:
    """Where a link leads out, none is given."""
    output = Output(out)
    span = output.record().plan.spans[0]
    given: dict[str, Callable[[], Any]] = {
        "analysis.json": lambda: output.analysis,
        "status.json": lambda: output.status,
        "views.sql": lambda: output.views,
        "shards": lambda: output.shards,
        "tables": lambda: output.tables,
        "tables/manifest.json": lambda: output.manifest,
        "tables/layers.parquet": lambda: output.table("layers"),
        "traced": lambda: output.traced,
        f"shards/{span.name}": lambda: output.span(span),
        f"shards/{span.name}/commit.json": lambda: output.commit(span),
        f"shards/{span.name}/x.parquet": lambda: output.shard(span, "x.parquet"),
    }
    for name, path in given.items():
        assert path() == out / name
    outside = tmp_path / "outside"
    outside.mkdir()
    for number, (name, path) in enumerate(reversed(given.items())):
        if (out / name).exists():
            (out / name).rename(tmp_path / f"was-{number}")
        (out / name).symlink_to(outside)
        with pytest.raises(CorruptionError, match="a link leads out of"):
            path()
    assert {name.partition("/")[0] for name in given} <= {*OWN}
