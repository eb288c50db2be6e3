"""Values are shown as they are, whatever they hold, on any terminal and in any pipe."""

import io
import logging
import os
import re
import subprocess
import sys
import unicodedata

import duckdb
import pytest
from rich.cells import cell_len

from k2flow.audit.report import AuditReport, Severity
from k2flow.cli import output, query
from k2flow.cli.process import any_output, exit_on_error
from k2flow.errors import QueryError
from k2flow.observability.logs import set_up_logging
from k2flow.printable import printable
from k2flow.query.connection import connect_tables
from k2flow.query.sql import string_literal

SHOWN = {
    "[/]": "[/]",
    "[btc]USDT": "[btc]USDT",
    "[bold red]x[/bold red]": "[bold red]x[/bold red]",
    "[link=x]y[/link]": "[link=x]y[/link]",
    "\\[escaped]": "\\[escaped]",
    "back\\": "back\\",
    ":smile: :+1:": ":smile: :+1:",
    "a\nb": "a\\nb",
    "a\r\tb": "a\\r\\tb",
    "\x1b[2J\x1b]0;title\x07": "\\x1b[2J\\x1b]0;title\\x07",
    "\x9b31m": "\\x9b31m",
    "nul\0": "nul\\x00",
    "right\u202eleft": "right\\u202eleft",
    "zero\u200bwidth\ufeff": "zero\\u200bwidth\\ufeff",
    "line\u2028break": "line\\u2028break",
    "\U000e0041": "\\U000e0041",
    "日本 ₿ 😀": "日本 ₿ 😀",
    "e\u0301 👩\u200d🚀": "e\u0301 👩\u200d🚀",
    "\ufffd\ud7ff\ue000\U0010ffff": "\ufffd\ud7ff\ue000\U0010ffff",
    "None NULL nan True 1e-8": "None NULL nan True 1e-8",
    "http://x 127.0.0.1 'quoted' 12.5": "http://x 127.0.0.1 'quoted' 12.5",
    "x" * 500: "x" * 500,
    " ": " ",
    "": "",
}


@pytest.mark.parametrize(("value", "shown"), SHOWN.items())
def test_text_of_one_line(value: str, shown: str) -> None:
    assert printable(value) == shown
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in printable(value))


def test_text_in_an_encoding_that_lacks_characters() -> None:
    assert printable("é日\udcff", "ascii") == "\\xe9\\u65e5\\udcff"
    assert printable("é日\udcff", "latin-1") == "é\\u65e5\\udcff"


def run(capsys: pytest.CaptureFixture[str], sql: str) -> list[str]:
    """Return the lines of `k2flow query`."""
    query.run_query(sql, "table", None)
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def connection() -> duckdb.DuckDBPyConnection:
    return connect_tables({})


@pytest.fixture(autouse=True)
def no_tables(monkeypatch: pytest.MonkeyPatch, connection: duckdb.DuckDBPyConnection) -> None:
    monkeypatch.setattr(query, "connect", lambda as_of: connection)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("value", "shown"), SHOWN.items())
def test_query_shows_values_and_names_as_they_are(capsys: pytest.CaptureFixture[str], value: str, shown: str) -> None:
    """In a pipe a row is one line, however long."""
    name = value.replace('"', '""').replace("\0", "") or "empty"
    literal = " || chr(0) || ".join(map(string_literal, value.split("\0")))
    lines = run(capsys, f'SELECT {literal} AS "{name}", 1 AS n')
    assert len(lines) == 5
    assert lines[1].startswith(f"┃ {printable(name)}")
    assert lines[3].split("│")[1].removeprefix(" ").startswith(shown)
    assert lines[3].split("│")[1].strip() == shown.strip()


@pytest.mark.parametrize(
    ("sql", "shown"),
    [
        ("0.00000001::DECIMAL(18, 8)", "0.00000001"),
        ("170141183460469231731687303715884105727::HUGEINT", "170141183460469231731687303715884105727"),
        ("TIMESTAMPTZ '2026-01-31 12:00:00.000001+00'", "2026-01-31 12:00:00.000001+00"),
        ("TIMESTAMPTZ '290000-01-01 00:00:00+00'", "290000-01-01 00:00:00+00"),
        ("'infinity'::TIMESTAMP", "infinity"),
        ("DATE '5000-01-01 (BC)'", "5000-01-01 (BC)"),
        ("INTERVAL 3 MONTH", "3 months"),
        (r"'\x00[/]\xff'::BLOB", r"\x00[/]\xFF"),
        ("['[/]', NULL]", "['[/]', NULL]"),
        ("MAP {'[a]': ':x:'}", "{'[a]'=':x:'}"),
        ("{'k': [1, 2]}", "{'k': [1, 2]}"),
        ("true", "true"),
        ("NULL", "NULL"),
        ("'nan'::DOUBLE", "nan"),
        ("[-5::HUGEINT]", "[-5]"),
        ("'0101'::BIT", "0101"),
        ("TIMETZ '10:00:00+02'", "10:00:00+02"),
        ("TIMESTAMP_NS '2026-01-31 12:00:00.000000001'", "2026-01-31 12:00:00.000000001"),
        ("{'v': 1::VARIANT}", "{'v': 1}"),
    ],
)
def test_query_shows_each_type_as_duckdb_writes_it(capsys: pytest.CaptureFixture[str], sql: str, shown: str) -> None:
    assert f" {shown} " in run(capsys, f"SELECT {sql} AS v")[3]


def test_query_of_no_rows_equal_names_and_no_relation(capsys: pytest.CaptureFixture[str]) -> None:
    assert "┃ [a] ┃" in run(capsys, 'SELECT 1 AS "[a]" WHERE false')[1]
    assert "│ 1 │ 2 │" in run(capsys, "SELECT 1 AS a, 2 AS a")[3]
    assert run(capsys, "CREATE TABLE t (i INTEGER)") == []
    assert any("DUMMY_SCAN" in line for line in run(capsys, "EXPLAIN SELECT 1"))
    assert [line for line in run(capsys, "SELECT range FROM range(5) ORDER BY range DESC") if "4" in line]


@pytest.mark.parametrize("columns", [1, 3, 20, 60])
@pytest.mark.parametrize("width", [20, 80, 100])
def test_terminal_of_any_width_shows_every_character(monkeypatch: pytest.MonkeyPatch, columns: int, width: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    values = ", ".join(f"repeat('日', 30) || repeat('x', {i}) AS c{i}" for i in range(columns))
    query.run_query(f"SELECT {values}", "table", None)
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert text.count("日") == 30 * columns
    assert text.count("x") == sum(range(columns))
    assert max(map(cell_len, text.splitlines())) <= max(width, output.LEAST_WIDTH)


def test_sql_that_is_not_utf_8_is_one_line() -> None:
    with pytest.raises(QueryError, match="not valid UTF-8 at its character 9"):
        query.run_query("SELECT '\udcff'", "table", None)


@pytest.mark.parametrize("sql", ["SELECT '[/", "SELEC [/red]", 'SELECT "[/]"', "SELECT error('[bold]\x1b[31m')"])
def test_error_has_brackets_and_no_control_character(capsys: pytest.CaptureFixture[str], sql: str) -> None:
    with pytest.raises(SystemExit), exit_on_error(1):
        query.run_query(sql, "table", None)
    error = capsys.readouterr().err
    assert "[" in error
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_audit_shows_topics_and_samples_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    partition = {"topic": "[/]t", "partition": 0, "current": False, "kafka": None, "missing": 0, "duplicated": 0}
    report = AuditReport("now", partitions=[partition])
    report.add("c", Severity.BROKEN, "[b]x\x1b[31m", samples=[{"message_id": "[/]\n:smile:"}])
    report.show(output.console())
    shown = capsys.readouterr().out
    assert "[/]t (earlier)" in shown
    assert "[b]x\\x1b[31m" in shown
    assert "message_id [/]\\n:smile:" in shown


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_log_record_is_one_line(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    before = logging.getLogger().handlers[:]
    try:
        set_up_logging("INFO", log_format)
        logging.getLogger("k2flow.x").info("id %s", "a\n2026 ERROR forged\x1b[2J\udcff")
        text = capsys.readouterr().err
    finally:
        logging.getLogger().handlers[:] = before
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "forged" in text


PRINT = "import sys; from k2flow.cli.process import any_output\nwith any_output(): print({!r}{}, flush=False)"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_standard_output(encoding: str) -> None:
    code = PRINT.format("é日\udcff", "")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True
    )
    assert done.stdout.decode(encoding).strip() == printable("é日\udcff", encoding)
    assert done.stderr == b""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_reader_that_leaves_ends_the_command_quietly(lines: int) -> None:
    """As `head` does: before the command has written anything, and in between."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT.format("text\n", f" * {lines}")], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    os.close(read)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 128 + 13


def test_output_that_fits_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with any_output():
        print("text")
    assert capsys.readouterr().out == "text\n"
