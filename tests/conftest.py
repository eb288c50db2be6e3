"""What several tests need: no settings of the caller's, a catalog of one's own, a real Kafka."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyiceberg.catalog import Catalog

from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names
from k2flow.iceberg.catalog import open_catalog
from k2flow.sandbox.kafka.local import LocalKafka, free_port

SAMPLE_TRADES = Path(__file__).parent / "data" / "kraken_btcusd_trades.csv"
LONGEST_FIRST = (
    "test_every_point",
    "test_torture",
    "test_kills",
    "test_damage_is_named",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--real-trades`: another CSV file of recorded trades for the tests that replay them."""
    parser.addoption("--real-trades", type=Path, metavar="CSV", default=SAMPLE_TRADES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long come first, so that of two processes neither is left with a long one at the end."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.name.partition("[")[0], len(place)))


@pytest.fixture(scope="session")
def real_trades(request: pytest.FixtureRequest) -> Path:
    """The CSV file of recorded trades to replay."""
    path: Path = request.config.getoption("--real-trades")
    return path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the caller's settings; K2FLOW_HOME is a folder of the test's own."""
    for name in list(os.environ):
        if name.startswith(("K2FLOW_", "PYICEBERG_", "BYTEWAX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("K2FLOW_HOME", str(tmp_path / "home"))


@pytest.fixture
def catalog() -> Catalog:
    """The SQLite catalog of the test's K2FLOW_HOME."""
    return open_catalog(load_settings(exchange_names()))


@pytest.fixture(scope="session", autouse=True)
def quick_java() -> Iterator[None]:
    """Brokers compile as little as they can: they start in half the time, and live too short for more to pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")
        yield


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalKafka]:
    """A real Kafka for the whole run, on a free port; tests make topics of their own."""
    with LocalKafka(tmp_path_factory.mktemp("kafka"), free_port()) as broker:
        yield broker
