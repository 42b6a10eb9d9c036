"""Nothing outside an output is written to, wherever in it a link is planted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import scenes
from click.testing import CliRunner

import lcray
from lcray.cli.app import app
from lcray.errors import CorruptionError, OutputError
from lcray.planning.plan import Span
from lcray.storage.lock import LOCK
from lcray.tables.shards.writer import ShardWriter

State = dict[str, tuple[int, int, bytes]]


def tree(folder: Path) -> State:
    """Time, inode and contents of everything in a folder, which itself counts as well."""
    return {
        str(path.relative_to(folder)): (
            (status := path.lstat()).st_mtime_ns,
            status.st_ino,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def plant(out: Path, name: str, elsewhere: Path, *, dangling: bool) -> None:
    """Puts a link to a place outside where something of the output is, or would be."""
    elsewhere.mkdir()
    target, place = elsewhere / "it", out / name
    if place.exists() and not dangling:
        place.rename(target)
    elif place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def check(out: Path, name: str, elsewhere: Path, write: Callable[[], object]) -> None:
    for dangling in (False, True):
        shutil.copytree(out, out.with_name("copy"), symlinks=True)
        plant(out, name, elsewhere, dangling=dangling)
        before = tree(elsewhere)
        with pytest.raises(OutputError, match="a link leads out of") as error:
            write()
        assert str(error.value).startswith(f"{out / name}: "), name
        assert "\n" not in str(error.value)
        assert tree(elsewhere) == before, name
        shutil.rmtree(elsewhere)
        shutil.rmtree(out)
        out.with_name("copy").rename(out)


FIXED = (
    *("analysis.json", "status.json", "views.sql", "shards", "tables", LOCK, f"{LOCK}/local"),
    *("findings", "traced"),
)
TABLES = ("manifest", "intervals", "layers", "parameters", "elements", "fits")


@pytest.mark.usefixtures("inline")
def test_no_verb_that_computes_follows_a_link(plain_run: Path, out: Path, tmp_path: Path) -> None:
    def analyze() -> object:
        return lcray.analyze(plain_run, "scenes:plain", out, **scenes.OPTIONS)

    def repair() -> object:
        return lcray.analyze(plain_run, "scenes:plain", out, repair=True, **scenes.OPTIONS)

    number = max(path.name for path in (out / LOCK).glob("0*.json"))
    span = scenes.spans_of(out)[1]
    for name in (*FIXED, f"{LOCK}/{number}", f"shards/{span}", f"shards/{span}/commit.json"):
        check(out, name, tmp_path / "elsewhere", analyze)
        check(out, name, tmp_path / "elsewhere", repair)
        check(out, name, tmp_path / "elsewhere", lambda: lcray.reduce(out))
    for table in TABLES:
        name = f"tables/{table}.parquet".replace("manifest.parquet", "manifest.json")
        check(out, name, tmp_path / "elsewhere", analyze)
        check(out, name, tmp_path / "elsewhere", lambda: lcray.reduce(out))


@pytest.mark.usefixtures("inline")
def test_a_span_that_is_to_be_computed_is_no_link(
    plain_run: Path, out: Path, tmp_path: Path
) -> None:
    """Its folder holds no commit, so nobody has looked through the link yet."""
    for span in scenes.spans_of(out)[:2]:
        shutil.rmtree(out / "shards" / span)
        (out / "shards" / span).mkdir()
    name = f"shards/{span}"

    def analyze() -> object:
        return lcray.analyze(plain_run, "scenes:plain", out, **scenes.OPTIONS)

    check(out, name, tmp_path / "elsewhere", analyze)
    plan = lcray.open(out).plan
    lost = next(one for one in plan.spans if one.name == span)
    check(out, name, tmp_path / "elsewhere", lambda: ShardWriter(out, lost, "a"))


def test_a_link_that_is_planted_while_a_span_is_computed(out: Path, tmp_path: Path) -> None:
    lost: Span = lcray.open(out).plan.spans[0]
    folder = out / "shards" / lost.name
    shutil.rmtree(folder)
    with ShardWriter(out, lost, "a") as writer:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CorruptionError, match="a link leads out of"):
            writer.commit(checkpoints={}, info={})
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.usefixtures("inline")
@pytest.mark.slow
def test_no_verb_that_reads_tables_follows_a_link(
    plain_run: Path, out: Path, tmp_path: Path
) -> None:
    def trace(into: Path | None = None) -> object:
        return lcray.trace(plain_run, "scenes:plain", out, elements=["top:1"], into=into)

    elsewhere, second = tmp_path / "elsewhere", shutil.copytree(out, tmp_path / "second")
    check(out, "traced", elsewhere, trace)
    trace()
    for name in ("analysis.json", "shards", "tables", LOCK):
        check(out, f"traced/{name}", elsewhere, trace)
    shutil.rmtree(out / "traced")
    check(out, "mine", elsewhere, lambda: trace(out / "mine" / "traced"))
    check(out, "report.html", elsewhere, lambda: lcray.report(out))
    check(out, "mine", elsewhere, lambda: lcray.report(out, file=out / "mine" / "page.html"))
    check(out, "comparison.html", elsewhere, lambda: lcray.report(out, second))
    for name in ("findings", "findings/shares.parquet"):
        check(out, name, elsewhere, lambda: lcray.findings(out, only=["shares"]))
    for kind in ("csv", "tensorboard", "wandb"):
        check(out, "mine", elsewhere, lambda kind=kind: lcray.export(out, kind, out / "mine"))
    check(out, "mine/layers.csv", elsewhere, lambda: lcray.export(out, "csv", out / "mine"))
    check(out, "mine/wandb", elsewhere, lambda: lcray.export(out, "wandb", out / "mine"))


def test_neither_does_a_query_through_another_name_of_the_output(out: Path, tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to(out)
    (tmp_path / "elsewhere").mkdir()
    (out / "mine").symlink_to(tmp_path / "elsewhere")
    for way in (out, tmp_path / "name", Path(os.path.relpath(out))):
        file = way / "mine" / "answer.csv"
        query = ["query", str(out), "SELECT 1", "--format", "csv", "--output", str(file)]
        done = CliRunner().invoke(app, query)
        assert isinstance(done.exception, CorruptionError), done.output
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_csv_export_does_not_write_through_what_a_killed_one_would_have_left(
    out: Path, tmp_path: Path
) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "csv" / ".layers.csv.partial").symlink_to(tmp_path / "victim")
    lcray.export(out, "csv", tmp_path / "csv", tables=["layers"])
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "csv" / "layers.csv").read_text().startswith("split,")


@pytest.mark.slow
def test_links_within_the_output_and_to_the_output_are_followed(out: Path, tmp_path: Path) -> None:
    (out / "tables").rename(out / "real")
    (out / "tables").symlink_to("real")
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")
    lcray.reduce(out)
    lcray.report(out)
    assert (tmp_path / "elsewhere" / "report.html").is_file()
