"""docs/adding-an-exchange.md, done as it stands: a third exchange out of one new file, audited."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import k2flow
from k2flow.exchange import exchange_names, find_exchange
from k2flow.sandbox.kafka.local import LocalKafka
from tests.documents import ROOT, Kind, blocks, kind, run

pytestmark = pytest.mark.integration

TUTORIAL = ROOT / "docs" / "adding-an-exchange.md"


@pytest.fixture
def folder(kafka: LocalKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of this process and of those that it starts, for files of flows that are not k2flow's."""
    folder = tmp_path / "path"
    (folder / "flows").mkdir(parents=True)
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("flows.coinbase", None)
    assert exchange_names() == ["binance", "kraken"]


def test_the_tutorial(folder: Path) -> None:
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
    assert printed["k2flow tables"].count(": made") == 4
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
    assert "holds" in printed["k2flow audit"]
