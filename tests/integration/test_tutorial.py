"""Add a third exchange by one file, as docs/adding-an-exchange.md and README.md show it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import k2flow
from k2flow.exchange import exchange_names, find_exchange
from k2flow.sandbox.kafka.local import LocalKafka
from tests.documents import ROOT, Kind, blocks, kind, run

TUTORIAL = ROOT / "docs" / "adding-an-exchange.md"
README = ROOT / "README.md"


@pytest.fixture
def folder(kafka: LocalKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder for foreign flows, on the path of this process and its children."""
    folder = tmp_path / "path"
    (folder / "flows").mkdir(parents=True)
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("flows.coinbase", None)
    assert exchange_names() == ["binance", "kraken"]


def test_tutorial_ends_in_audited_tables(folder: Path) -> None:
    printed: dict[str, str] = {}
    for block in blocks(TUTORIAL):
        if block.language == "python":
            (folder / block.info).write_text(block.text)
            continue
        assert block.language == "sh", block
        for command in block.commands():
            assert kind(command) == Kind.RUN, command
            printed[" ".join(command[:2])] = run(command)
    assert not (ROOT / "flows" / "coinbase.py").exists()
    assert printed["k2flow tables"].count(": created") == 4
    assert "20,000 messages to market.crypto.trades.coinbase" in printed["k2flow produce"]
    connection = k2flow.connect()

    def count(sql: str) -> int:
        return int(connection.sql(f"SELECT count(*) FROM {sql}").fetchall()[0][0])

    assert count("bronze_coinbase_trades") == 20_000
    assert count("silver_coinbase_trades") + count("dlq_coinbase_trades") == 20_000
    unwanted = count("dlq_coinbase_trades WHERE reason = 'symbol_not_wanted'")
    assert unwanted == count("dlq_coinbase_trades WHERE detail LIKE '%BNBUSD%'") > 100
    assert count("silver_coinbase_trades WHERE symbol = 'BNBUSD'") == 0
    assert count("gold_crypto_trades WHERE exchange = 'COINBASE'") > 15_000
    assert find_exchange("coinbase").rules[0].reason == "symbol_not_wanted"
    assert "all invariants hold" in printed["k2flow audit"]


def test_exchange_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2FLOW_COINBASE_TOPIC", "market.crypto.trades.coinbase.readme")
    (block,) = [each for each in blocks(README) if each.info]
    (folder / block.info).write_text(block.text)
    (rule,) = find_exchange("coinbase").rules
    trades = pa.record_batch({"currency": ["USD", "EUR", "USDT", None]})
    assert rule.valid(trades).to_pylist() == [True, True, False, False]
    run(["k2flow", "kafka", "start"])
    run(["k2flow", "produce", "coinbase", "--count", "2000", "--bad", "0.05", "--seed", "1"])
    run(["k2flow", "run", "coinbase", "--until-caught-up"])
    run(["k2flow", "audit", "coinbase"])
    rows = k2flow.connect().sql("SELECT DISTINCT currency FROM silver_coinbase_trades").fetchall()
    assert rows == [("USD",)]
