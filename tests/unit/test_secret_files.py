"""Settings in files: how they are read and refused, and that no other process sees them."""

import os
from pathlib import Path

import pytest

from k2flow.config import secret_files
from k2flow.config.settings import load_exchange_settings, load_settings, property_origins
from k2flow.errors import SettingsError
from k2flow.iceberg.catalog import configured

NAMES = ["binance"]
PASSWORD = "K2FLOW_KAFKA_SASL_PASSWORD"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set K2FLOW_SECRETS_DIR to an empty folder. The environment is restored after the test."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setenv(secret_files.VARIABLE, str(folder))
    monkeypatch.setattr(secret_files, "_from_files", {})
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return folder


def test_files_are_settings(folder: Path) -> None:
    (folder / PASSWORD).write_text("it's a secret\n")
    (folder / "K2FLOW_BINANCE_TOPIC").write_text("trades")
    (folder / "PYICEBERG_CATALOG__K2FLOW__S3__SECRET_ACCESS_KEY").write_text("key\r\n")
    settings = load_settings(NAMES)
    assert settings.kafka["sasl.password"] == "it's a secret"
    assert load_exchange_settings("binance", {"bronze_retention_days": 1, "bronze_file_size_mb": 1}).topic == "trades"
    assert configured(settings) == {"s3.secret-access-key": "key"}
    assert [(o.value, o.source) for o in property_origins(settings) if o.name == PASSWORD] == [("****", "file")]


def test_files_are_read_again_and_not_inherited(folder: Path) -> None:
    (folder / PASSWORD).write_text("old")
    load_settings(NAMES)
    (folder / PASSWORD).write_text("new")
    assert load_settings(NAMES).kafka["sasl.password"] == "new"
    assert PASSWORD in os.environ
    assert PASSWORD not in secret_files.inheritable_environment()
    assert secret_files.VARIABLE in secret_files.inheritable_environment()


def test_kubernetes_versions_of_the_folder_are_skipped(folder: Path) -> None:
    (folder / "..2026_01_31").mkdir()
    (folder / "..2026_01_31" / PASSWORD).write_text("x")
    (folder / "..data").symlink_to("..2026_01_31")
    (folder / PASSWORD).symlink_to(f"..data/{PASSWORD}")
    assert secret_files.read_files(folder) == {PASSWORD: "x"}


@pytest.mark.parametrize("name", ["password", "HOME", "K2FLOW", secret_files.VARIABLE, "k2flow_home"])
def test_file_without_a_setting_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(SettingsError, match=f"{name} is no setting"):
        load_settings(NAMES)


def test_unknown_setting_is_named(folder: Path) -> None:
    (folder / "K2FLOW_HOMEE").write_text("x")
    with pytest.raises(SettingsError, match="unknown setting K2FLOW_HOMEE"):
        load_settings(NAMES)


def test_setting_in_both_places_is_named(folder: Path) -> None:
    os.environ[PASSWORD] = "x"
    (folder / PASSWORD).write_text("y")
    with pytest.raises(SettingsError, match=f"{PASSWORD} is set twice"):
        load_settings(NAMES)


@pytest.mark.parametrize("held", [b"\xff", b"a\0b"])
def test_file_without_text_is_named_and_not_shown(folder: Path, held: bytes) -> None:
    (folder / PASSWORD).write_bytes(held)
    with pytest.raises(SettingsError, match=PASSWORD):
        load_settings(NAMES)


def test_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / PASSWORD).mkdir()
    with pytest.raises(SettingsError, match=f"Is a directory: .*{PASSWORD}"):
        load_settings(NAMES)
    monkeypatch.setitem(os.environ, secret_files.VARIABLE, str(folder / "nowhere"))
    with pytest.raises(SettingsError, match=r"No such file or directory: .*nowhere"):
        load_settings(NAMES)
