"""Run the commands, Python and SQL of the documents in order, on tables with trades of both exchanges."""

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

import k2flow
from k2flow.layers import GOLD_TABLE
from k2flow.sandbox.kafka.local import LocalKafka
from tests.documents import (
    OTHER_LANGUAGES,
    ROOT,
    Block,
    Kind,
    blocks,
    documents,
    kind,
    parse,
    run,
    run_process,
    settings_of,
)

TUTORIAL = ROOT / "docs" / "adding-an-exchange.md"  # test_tutorial.py runs it
DEPLOYMENT = ROOT / "docs" / "deploy.md"  # needs machines that a test does not have
ELSEWHERE = "s3://"
"""In SQL that reads tables which do not exist here."""
OLD = {"old_silver": "silver_binance_trades", "old_gold": GOLD_TABLE}
"""The tables of the former system, and those of k2flow that replace them here."""
FILL = (
    "kafka start",
    "produce binance --count 4000 --bad 0.05 --duplicates 0.05",
    "produce kraken --count 4000 --bad 0.05 --duplicates 0.05",
    "run binance kraken --until-caught-up",
    "run candles --until-caught-up",
)


class Lake:
    """The tables of this test: their catalog, a copy of it, and the commands run so far."""

    def __init__(self, home: Path) -> None:
        self.catalog, self.copy = home / "catalog.db", home / "copy.db"
        self.done: set[str] = set()


@pytest.fixture
def lake(kafka: LocalKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """Return tables with some thousand trades of each exchange, caught up."""
    monkeypatch.setenv("K2FLOW_HOME", str(tmp_path))
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap)
    monkeypatch.setenv("K2FLOW_BINANCE_PROCESSES", "1")
    filled = Lake(tmp_path)
    for command in FILL:
        run(["k2flow", *command.split()])
        filled.done.add(f"k2flow {command}")
    shutil.copy(filled.catalog, filled.copy)
    return filled


def test_blocks_of_the_documents_run(lake: Lake, subtests: pytest.Subtests) -> None:
    """Run them in order, since each block finds the tables as the one before has left them."""
    for path in documents():
        if path == TUTORIAL:
            continue
        reader = Reader(lake, only_parse=path == DEPLOYMENT)
        for block in blocks(path):
            with subtests.test(str(block)):
                reader.do(block)
    assert "k2flow audit" in lake.done  # after the catalog was lost
    assert bronze_rows("binance") >= 24_000
    assert bronze_rows("kraken") >= 4_000
    with subtests.test("restored catalog"):
        check_restored(lake)
    with subtests.test("queries of the migration"):
        check_migration()


class Reader:
    """Runs one document, block by block. A command already run on this catalog is not repeated."""

    def __init__(self, lake: Lake, only_parse: bool) -> None:
        self._lake = lake
        self._only_parse = only_parse
        self._tables: duckdb.DuckDBPyConnection | None = None

    def do(self, block: Block) -> None:
        match block.language:
            case "sh":
                for words in block.commands():
                    self._command(words)
            case "python" if block.info or "import pandas" in block.text:
                return  # the file of an exchange: test_tutorial.py runs it; pandas: test_package.py does
            case "python":
                self._python(block)
            case "sql":
                self._sql(block.text)
            case language:
                assert language in OTHER_LANGUAGES, f"{block}: {language!r} is not a known language"

    def _command(self, words: list[str]) -> None:
        settings, command = settings_of(words)
        if not command:
            return
        what, text = kind(command), " ".join(words)
        if command[0] == "k2flow":
            parse(command)
        if self._only_parse or what in (Kind.PARSE, Kind.OTHER) or text in self._lake.done:
            return
        (run if what is Kind.RUN else run_process)(command, settings)
        self._lake.done.add(text)

    def _python(self, block: Block) -> None:
        if "register_table" in block.text:
            self._lake.catalog.unlink()
            self._lake.done.clear()
        exec(compile(block.text, str(block), "exec"), {})

    def _sql(self, text: str) -> None:
        """Run all SQL of a document on one connection, since later blocks use the views of earlier ones."""
        if self._tables is None:
            self._tables = k2flow.connect()
            for view, table in OLD.items():
                self._tables.execute(f"CREATE VIEW {view} AS SELECT * FROM {table}")
        for statement in duckdb.extract_statements(text):
            if ELSEWHERE not in statement.query:
                self._tables.execute(statement.query).fetchall()


def check_restored(lake: Lake) -> None:
    """Restore an older catalog as docs/operations.md says: storage has newer files, Kafka the messages since."""
    before = bronze_rows("binance")
    shutil.copy(lake.copy, lake.catalog)
    assert bronze_rows("binance") < before
    run(["k2flow", "run", "binance", "--until-caught-up"])
    assert bronze_rows("binance") == before
    run(["k2flow", "audit"])


def bronze_rows(exchange: str) -> int:
    return int(k2flow.connect().execute(f"SELECT count(*) FROM bronze_{exchange}_trades").fetchall()[0][0])


def check_migration() -> None:
    """Check that each query finds nothing in equal tables, and finds a planted difference."""
    texts = [b.text for b in blocks(ROOT / "docs" / "migration.md") if b.language == "sql" and ELSEWHERE not in b.text]
    days, duplicates, ids, values, letters = texts[:5]
    connection = k2flow.connect()

    def old(view: str, select: str) -> None:
        connection.execute(f"CREATE OR REPLACE VIEW {view} AS {select}")

    def found(sql: str) -> list[tuple[Any, ...]]:
        return connection.execute(sql).fetchall()

    for view, table in OLD.items():
        old(view, f"SELECT * FROM {table}")
    assert not found(days)
    assert not found(ids)
    assert not found(values)
    assert found(duplicates) == [("old", 0), ("new", 0)]

    old("old_silver", f"SELECT * FROM {OLD['old_silver']} UNION ALL (SELECT * FROM {OLD['old_silver']} LIMIT 3)")
    assert {new - before for _, new, before, _, _ in found(days)} <= {1, 2, 3}
    assert found(days)
    old("old_gold", f"SELECT * FROM {GOLD_TABLE} UNION ALL (SELECT * FROM {GOLD_TABLE} LIMIT 3)")
    assert found(duplicates) == [("old", 3), ("new", 0)]
    others = "today() - 1 AS exchange_date, 'other ' || message_id AS message_id"
    old("old_gold", f"SELECT * REPLACE ({others}) FROM {GOLD_TABLE} LIMIT 2")
    assert [only_in_new for _, _, only_in_new in found(ids)].count(False) == 2

    ((changed,),) = found(f"SELECT message_id FROM {GOLD_TABLE} LIMIT 1")
    old("old_gold", f"SELECT * REPLACE (if(message_id = '{changed}', price + 1, price) AS price) FROM {GOLD_TABLE}")
    assert [message_id for _, message_id, *_ in found(values)] == [changed]

    ((payload,),) = found("SELECT payload FROM dlq_binance_trades WHERE reason = 'invalid_side' LIMIT 1")
    message_id = payload[6:42].decode()  # after the header and the length
    asked = letters.replace("0b6f1e52-8c0f-4f0e-9d3a-6c6c1ad6c3a1", message_id)
    assert message_id in asked
    assert [reason for reason, *_ in found(asked)] == ["invalid_side"]
