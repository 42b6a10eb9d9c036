"""What commands print: in any encoding, and without what a terminal would obey."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planting
import pytest
import scenes
from console import exit_code

import lcray
from lcray.cli import terminal
from lcray.errors import UsageError

LOUD = ("a\x1b[31mred", "b\nc", "d\x07\x9b2J\u202e", "größe.λ", "emoji-🙂")
SPLITS = ("train\x1b]0;title\x07", "val\nidation")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lc = {(split, name): rng.normal(size=(6, 4)) for split in SPLITS for name in LOUD}
    return planting.from_elements(tmp_path_factory.mktemp("terminal") / "out", lc, window=3)


class Screen(io.TextIOWrapper):
    """A standard output of some encoding, strict as Python's, and a terminal where told so."""

    def __init__(self, encoding: str, *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    def text(self) -> str:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


Outcome = Callable[..., tuple[int, str, str]]


@pytest.fixture
def on_screen(monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Runs ``lcray ARGUMENTS`` in this process, with standard streams of one encoding."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: object, encoding: str, tty: bool = False) -> tuple[int, str, str]:
        streams = Screen(encoding, tty=tty), Screen(encoding)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", streams[0])
            patch.setattr("sys.stderr", streams[1])
            code = exit_code(*arguments)
        return code, streams[0].text(), streams[1].text()

    return run


PRINTING = (
    ["query", "OUT"],
    ["query", "OUT", "SELECT split, layer, sum(lc) AS \"Σ\nlc\" FROM layers GROUP BY ALL"],
    ["findings", "OUT", "--only", "layer_totals,shares"],
    ["status", "OUT"],
    ["verify", "OUT"],
    ["report", "OUT", "--out", "TMP/größe.html"],
    ["export", "OUT", "--to", "csv", "--out", "TMP/größe"],
    ["inspect", "RUN"],
    ["query", "OUT", "SELECT größe"],
    ["findings", "--help"],
    ["query", "--help"],
    ["compare", "--help"],
    ["--help"],
    [],
)  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
@pytest.mark.slow
def test_any_encoding_and_no_control_characters(
    out: Path,
    plain_run: Path,
    tmp_path: Path,
    on_screen: Outcome,
    arguments: list[str],
    encoding: str,
) -> None:
    places = {"OUT": str(out), "RUN": str(plain_run), "TMP": str(tmp_path)}
    given = [re.sub("OUT|RUN|TMP", lambda found: places[found[0]], a) for a in arguments]
    code, said, errors = on_screen(*given, encoding=encoding)
    assert said or errors
    assert code == (1 if arguments[0:1] == ["verify"] else 2 if "SELECT größe" in given else
                    2 if not arguments else 0)  # fmt: skip
    assert "Traceback" not in said + errors
    for text in (said, errors):
        assert not [c for c in text if not c.isprintable() and c not in "\n\t"], repr(text)


def test_an_analysis_ends_well_where_sigma_cannot_be_said(
    plain_run: Path, tmp_path: Path, on_screen: Outcome, inline: None
) -> None:
    for encoding, sigma in (("ascii", "sum LC"), ("latin-1", "sum LC"), ("utf-8", "Σ LC")):
        target = tmp_path / encoding
        arguments = ["analyze", plain_run, "--task", "scenes:plain", "--out", target]
        code, said, errors = on_screen(*arguments, encoding=encoding)
        assert code == 0, errors
        assert sigma in said
        assert lcray.status(target).state == "finished"


def test_names_stay_on_their_line(out: Path, on_screen: Outcome) -> None:
    """Raw, a name could end its row and begin another."""
    _, said, _ = on_screen("query", out, "SELECT DISTINCT layer FROM layers", encoding="utf-8")
    shown = [r"a\x1b[31mred", r"b\nc", r"d\x07\x9b2J\u202e", "größe.λ", "emoji-🙂"]
    assert sorted(line.strip() for line in said.splitlines()[1:]) == sorted(shown)
    code, said, _ = on_screen("findings", out, "--only", "layer_totals", encoding="utf-8")
    assert code == 0
    for name in shown:
        assert [line for line in said.splitlines() if f" {name} " in line], said
    assert r"train\x1b]0;title\x07" in said
    _, said, _ = on_screen("query", out, 'SELECT 1 AS "x\x1b[1m\ny"', encoding="utf-8", tty=True)
    assert r"x\x1b[1m\ny" in said and "\x1b" not in said


def test_tables_that_stand_on_end_have_a_line_a_value(out: Path, on_screen: Outcome) -> None:
    columns = ", ".join(f'layer AS "name {i}\n"' for i in range(12))
    query = f"SELECT {columns} FROM layers WHERE layer = 'b\nc' LIMIT 1"
    _, said, _ = on_screen("query", out, query, encoding="utf-8", tty=True)
    assert [line.rstrip() for line in said.splitlines()] == [
        f"name {i}\\n".ljust(11) + r"b\nc" for i in range(12)
    ]


def test_csv_has_names_as_they_are_unless_a_terminal_would_obey_them(
    out: Path, on_screen: Outcome
) -> None:
    query = ["query", out, "SELECT DISTINCT layer FROM layers", "--format", "csv"]
    code, said, _ = on_screen(*query, encoding="utf-8")
    assert code == 0
    assert {row["layer"] for row in csv.DictReader(io.StringIO(said, newline=""))} == {*LOUD}
    code, said, _ = on_screen(*query, encoding="utf-8", tty=True)
    assert code == 0 and "\x1b" not in said and r"a\x1b[31mred" in said
    code, said, _ = on_screen(*query, encoding="ascii", tty=True)
    assert code == 0 and r"gr\xf6\xdfe.\u03bb" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
     {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=str,
)  # fmt: skip
def test_a_process_of_that_encoding(out: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lcray", "query", str(out), "SELECT layer AS Σ FROM layers"],
        env=scenes.python_environment() | environment,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"sum" in done.stdout and b"emoji-\\U0001f642" in done.stdout


@pytest.mark.slow
def test_a_query_of_no_text_is_one_line(out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lcray", "query", str(out), b"SELECT '\xff' AS a"],
        env=scenes.python_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "lcray: SQL: not valid UTF-8 at character 8 ('\\udcff'); write the query in UTF-8\n"
    )


def test_a_query_with_half_a_character_is_refused(out: Path) -> None:
    with pytest.raises(UsageError, match=r"^SQL: not valid UTF-8 at character 8"):
        lcray.query(out, "SELECT '\udcff' AS a")


def test_what_an_encoding_lacks_is_written_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Screen("ascii"))
    assert terminal.fitting("Σ LC −1 ± 2… → ë 🙂") == "sum LC -1 +/- 2... -> \\xeb \\U0001f642"
    monkeypatch.setattr("sys.stdout", Screen("latin-1"))
    assert terminal.fitting("Σ ë ± λ") == "sum ë ± \\u03bb"
    assert terminal.harmless("a\tb\n\x1b\x85") == "a\tb\n\\x1b\\x85"
