"""Shared by all tests: their tiers, their seed, clean settings, a catalog and one real Kafka."""

import fcntl
import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from pyiceberg.catalog import Catalog
from pyiceberg.serializers import FromInputFile, ToOutputFile

from k2flow.compat.pyiceberg import metadata_cache
from k2flow.config.settings import load_settings
from k2flow.exchange import all_exchanges, exchange_names
from k2flow.iceberg.catalog import open_catalog
from k2flow.sandbox.kafka.local import LocalKafka, free_port

settings.register_profile("k2flow", deadline=None)  # no test depends on the speed of the machine
settings.load_profile("k2flow")
TESTS = Path(__file__).parent
SAMPLE_TRADES = TESTS / "data" / "kraken_btcusd_trades.csv"
SEED = "TEST_SEED"
"""Environment variable: the seed of the random tests. If it is not set, each run draws a new one."""
SLOW_FILES = (
    "integration/test_bench.py",
    "integration/test_demo.py",
    "integration/test_docs.py",
    "integration/test_hosts.py",
    "integration/test_kills.py",
    "integration/test_kubernetes.py",
    "integration/test_local_kafka.py",
    "integration/test_outages.py",
    "integration/test_package.py",
    "integration/test_readers.py",
    "integration/test_replaced_log.py",
    "integration/test_run.py",
    "integration/test_stack.py",
    "integration/test_surroundings.py",
    "integration/test_torture.py",
    "integration/test_tracing.py",
    "integration/test_tutorial.py",
)
"""Files that only `scripts/test all` runs. Single tests elsewhere are marked `slow` in place."""
LONGEST_FIRST = (
    "integration/test_surroundings.py",
    "integration/test_torture.py",
    "integration/test_docs.py",
    "integration/test_failpoints.py",
    "integration/test_readers.py",
    "integration/test_kills.py",
    "integration/test_reprocess.py",
    "integration/test_hosts.py",
    "integration/test_audit_damage.py",
    "property/test_avro_decoder.py",
    "property/test_dedup.py",
    "unit/test_produce.py",
)
"""Files with the longest tests or groups of tests, in the order in which they start."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--real-trades`: another CSV file of recorded trades for the tests that replay them."""
    parser.addoption("--real-trades", type=Path, metavar="CSV", default=SAMPLE_TRADES)


def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed before the workers start: they inherit the environment. SIGTERM ends a run as Ctrl-C does."""
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**32)))
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the shared Kafka would outlive the run


def pytest_report_header() -> str:
    return f"seed: {os.environ[SEED]} (set {SEED} to repeat a run)"


@pytest.hookimpl(tryfirst=True)  # the markers must be there when -m selects by them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier, by its folder and file. Sort the longest first, so that no worker ends with one."""
    for item in items:
        name = file_name(item)
        if name.startswith("integration/"):
            item.add_marker(pytest.mark.integration)
        if name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(file_name(item), len(place)))


def file_name(item: pytest.Item) -> str:
    """Return the path of a test's file under tests/."""
    return item.path.relative_to(TESTS).as_posix()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the Kafka that the workers shared, once all of them have ended."""
    if not hasattr(session.config, "workerinput"):
        folder = shared_folder(session.config)
        if (folder / "kafka").exists():
            LocalKafka(folder / "kafka").stop()


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of this run; the header of the run shows it."""
    return int(os.environ[SEED])


@pytest.fixture(scope="session")
def real_trades(request: pytest.FixtureRequest) -> Path:
    """The CSV file of recorded trades to replay."""
    path: Path = request.config.getoption("--real-trades")
    return path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the caller's settings; K2FLOW_HOME is a folder of the test's own."""
    for name in list(os.environ):
        if name.startswith(("K2FLOW_", "PYICEBERG_", "BYTEWAX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("K2FLOW_HOME", str(tmp_path / "home"))
    forget_settings()


def forget_settings() -> None:
    """Let each exchange read its settings again: it keeps those that it read under another environment."""
    for exchange in all_exchanges():
        vars(exchange).pop("settings", None)


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Undo what a command that a test runs in this process leaves behind: log levels, its log, the metadata cache."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(("k2flow", "pyiceberg"))]
    levels = {logger: logger.level for logger in (logging.root, *map(logging.getLogger, names))}
    yield
    for logger, level in levels.items():
        logger.setLevel(level)
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # not one of pytest's
            logging.root.removeHandler(handler)
    metadata_cache._cache.clear()
    metadata_cache._versions.clear()
    FromInputFile.table_metadata = staticmethod(metadata_cache._read)  # type: ignore[method-assign]
    ToOutputFile.table_metadata = staticmethod(metadata_cache._write)  # type: ignore[method-assign]


@pytest.fixture
def catalog() -> Catalog:
    """The SQLite catalog of the test's K2FLOW_HOME."""
    return open_catalog(load_settings(exchange_names()))


@pytest.fixture(scope="session", autouse=True)
def quick_java() -> Iterator[None]:
    """Let brokers compile as little as possible: they start in half the time and live too short for more to pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")
        yield


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> LocalKafka:
    """One real Kafka for the whole run, shared by all workers; tests create their own topics.

    The first worker that needs it starts it; `pytest_sessionfinish` stops it.
    """
    folder = shared_folder(request.config)
    port = folder / "kafka.port"
    with (folder / "kafka.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not port.exists():
            port.write_text(str(free_port()))
        broker = LocalKafka(folder / "kafka", int(port.read_text()))
        broker.start()
    return broker


def shared_folder(config: pytest.Config) -> Path:
    """A temporary folder that all workers of this run see."""
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    own = factory.getbasetemp()
    return own.parent if hasattr(config, "workerinput") else own
