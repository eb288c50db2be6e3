"""Settings: how they are read, refused and shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from k2flow.config.settings import load_exchange_settings, load_settings, mask, origins, property_origins
from k2flow.errors import SettingsError
from k2flow.exchange import exchange_names, find_exchange

NAMES = ["binance", "kraken"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("K2FLOW_"):
            monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = load_settings(NAMES)
    assert settings.schema_ids == (1,)
    assert settings.kafka == {"bootstrap.servers": "127.0.0.1:9092"}
    assert not settings.until_caught_up


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2FLOW_SCHEMA_IDS", "1, 7,4294967295")
    monkeypatch.setenv("K2FLOW_UNTIL_CAUGHT_UP", "1")
    monkeypatch.setenv("K2FLOW_KAFKA_SASL_MECHANISM", "PLAIN")
    settings = load_settings(NAMES)
    assert settings.schema_ids == (1, 7, 4294967295)
    assert settings.until_caught_up
    assert settings.kafka["sasl.mechanism"] == "PLAIN"


@pytest.mark.parametrize("value", ["", "x", "-1", "4294967296", "1,,2"])
def test_wrong_schema_ids(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("K2FLOW_SCHEMA_IDS", value)
    with pytest.raises(SettingsError, match="K2FLOW_SCHEMA_IDS"):
        load_settings(NAMES)


@pytest.mark.parametrize("name", ["K2FLOW_HOMEE", "K2FLOW_BINANCE_TRIGGER", "K2FLOW_COINBASE_TOPIC", "K2FLOW_"])
def test_unknown_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"unknown setting {name}"):
        load_settings(NAMES)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("HOMEE", "HOME"),
        ("SECRETS", "SECRETS_DIR"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("LOG", "LOG_LEVEL"),
        ("SCHEMA_REGISTRY", "SCHEMA_REGISTRY_URL"),
        ("SCHEMA_ID", "SCHEMA_IDS"),
        ("REGISTRY_URL", "SCHEMA_REGISTRY_URL"),
        ("PORT", "METRICS_PORT"),
        ("UNTIL_CAUGHTUP", "UNTIL_CAUGHT_UP"),
        ("KAFA_BOOTSTRAP_SERVERS", "KAFKA_BOOTSTRAP_SERVERS"),
        ("BINANCE_TRIGER", "BINANCE_TRIGGER_SECONDS"),
        ("BINANCE_TRIGGER", "BINANCE_TRIGGER_SECONDS"),
        ("BINANCE_TRIGER_SECONDS", "BINANCE_TRIGGER_SECONDS"),
        ("KRAKEN_TOPC", "KRAKEN_TOPIC"),
        ("KRAKEN_DEDUP_WINDOW", "KRAKEN_DEDUP_WINDOW_HOURS"),
        ("KRAKEN_SILVER_RETENTION", "KRAKEN_SILVER_RETENTION_DAYS"),
        ("KRAKEN_COMMIT_BATCH", "KRAKEN_COMMIT_BATCHES"),
        ("BINACE_TOPIC", "BINANCE_TOPIC"),
        ("TRIGGER_SECONDS", "KRAKEN_TRIGGER_SECONDS"),
    ],
)
def test_misspelt_setting_suggests_the_closest(monkeypatch: pytest.MonkeyPatch, typed: str, meant: str) -> None:
    monkeypatch.setenv(f"K2FLOW_{typed}", "1")
    with pytest.raises(SettingsError, match=rf"unknown setting K2FLOW_{typed}: did you mean K2FLOW_{meant}\?$"):
        load_settings(NAMES)


@pytest.mark.parametrize("typed", ["COINBASE_TOPIC", "BINANCE_WORKERS", "BINANCE_HOME", "BINANCE_", "X"])
def test_setting_like_no_other_suggests_the_list(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setenv(f"K2FLOW_{typed}", "1")
    with pytest.raises(SettingsError, match=f"unknown setting K2FLOW_{typed}: `k2flow config` lists the known ones"):
        load_settings(NAMES)


def test_environment_overrides_the_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = find_exchange("binance").declared
    assert load_exchange_settings("binance", declared).trigger_seconds == 10
    monkeypatch.setenv("K2FLOW_BINANCE_TRIGGER_SECONDS", "1")
    assert load_exchange_settings("binance", declared).trigger_seconds == 1


@pytest.mark.parametrize(("name", "value"), [("TRIGGER_SECONDS", "0"), ("PROCESSES", "many"), ("TOPIC", "")])
def test_wrong_exchange_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"K2FLOW_BINANCE_{name}", value)
    with pytest.raises(SettingsError, match=f"K2FLOW_BINANCE_{name}"):
        load_exchange_settings("binance", find_exchange("binance").declared)


@pytest.mark.parametrize(
    ("exchange", "topic", "partitions", "retention", "size", "trigger", "processes"),
    [
        ("binance", "market.crypto.trades.binance", 6, 7, 128, 10, 3),
        ("kraken", "market.crypto.trades.kraken", 2, 14, 64, 30, 1),
    ],
)
def test_declarations_of_the_exchanges(
    exchange: str, topic: str, partitions: int, retention: int, size: int, trigger: int, processes: int
) -> None:
    s = load_exchange_settings(exchange, find_exchange(exchange).declared)
    assert (s.topic, s.partitions, s.trigger_seconds, s.processes) == (topic, partitions, trigger, processes)
    assert (s.bronze_retention_days, s.bronze_file_size_mb) == (retention, size)
    assert exchange in exchange_names()


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2FLOW_KAFKA_SASL_PASSWORD", "hunter2")
    rows = {origin.name: origin for origin in property_origins(load_settings(NAMES))}
    assert rows["K2FLOW_KAFKA_SASL_PASSWORD"].value == "****"
    assert rows["K2FLOW_KAFKA_SASL_PASSWORD"].source == "environment"
    assert mask("uri", "postgresql://me:hunter2@db/x") == "postgresql://me:****@db/x"
    assert mask("s3.secret-access-key", "hunter2") == "****"


def test_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2FLOW_BINANCE_PROCESSES", "2")
    declared = find_exchange("binance").declared
    model = load_exchange_settings("binance", declared)
    rows = {o.name: (o.value, o.source) for o in origins(model, "K2FLOW_BINANCE_", declared, "flows/binance.py")}
    assert rows["K2FLOW_BINANCE_PROCESSES"] == ("2", "environment")
    assert rows["K2FLOW_BINANCE_TOPIC"] == ("market.crypto.trades.binance", "flows/binance.py")
    assert rows["K2FLOW_BINANCE_DEDUP_WINDOW_HOURS"] == ("24", "default")


@pytest.mark.parametrize("held", [b"catalog:\n  k2flow: [\n", b"\xff\xfe"])
def test_unreadable_catalog_file_is_one_line(tmp_path: Path, held: bytes) -> None:
    (tmp_path / ".pyiceberg.yaml").write_bytes(held)
    line = [sys.executable, "-m", "k2flow", "tables", "list"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("k2flow: error: PyIceberg's .pyiceberg.yaml cannot be read: ")
    assert done.stderr.count("\n") == 1
