"""docs/configuration.md is current, and has every setting."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from k2flow.cli.commands import app
from k2flow.config.settings import ExchangeSettings, Settings
from k2flow.exchange import exchange_names

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_the_output_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has no influence on the page."""
    monkeypatch.setenv("K2FLOW_BINANCE_TRIGGER_SECONDS", "77")
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", "elsewhere:1")
    done = CliRunner().invoke(app, ["config", "--markdown"])
    assert done.exit_code == 0, done.output
    assert done.stdout == PAGE.read_text(), "run `k2flow config --markdown > docs/configuration.md`"


def test_page_has_every_setting_with_its_description() -> None:
    rows = {cells[1].strip(): cells for line in PAGE.read_text().splitlines() if len(cells := line.split("|")) == 6}
    for prefix, model in (("K2FLOW_", Settings), ("", ExchangeSettings)):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert rows[f"`{prefix}{name.upper()}`"][4].strip() == field.description
    assert rows["`K2FLOW_METRICS_PORT`"][2:4] == [" whole number, from 1 to 65,535 ", "  "]
    assert rows["`TRIGGER_SECONDS`"][2:4] == [" number, from 0.1 to 3,600 ", " `10` "]
    assert rows["`UNKNOWN_FIELDS`"][2:4] == [" `keep` or `ignore` ", " `keep` "]


def test_page_has_the_declarations_of_each_exchange() -> None:
    page = PAGE.read_text()
    for name in exchange_names():
        assert f"`K2FLOW_{name.upper()}_TOPIC` | `market.crypto.trades.{name}`" in page
