"""The units of systemd/: systemd accepts them, k2flow accepts what they name, and both speak sd_notify(3)."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from k2flow.cli.options import parse_duration
from k2flow.config.settings import Settings
from k2flow.observability.systemd import MAX_STATUS, report_to_systemd
from k2flow.process_exit import EXIT_FAILED, EXIT_UNAVAILABLE
from tests.deployment import FLOW_NAMES, SYSTEMD, Unit, secrets_drop_in, units
from tests.documents import as_a_process, parse
from tests.notify import NotifySocket
from tests.unit.test_deploy import load_all_settings

UNITS = list(units())
INSTALLED = "/opt/k2flow/bin/k2flow"
MAX_EXPOSURE = 15  # tenths: `systemd-analyze security` calls up to 2.0 "OK", its best word
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the real `systemd-analyze`. Skip the test where there is none."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: scripts/packages installs it, on Debian as root")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Copy the units with a program that exists, the template as an instance of each flow; return their paths."""
    folder = tmp_path_factory.mktemp("units")
    for source in (*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.target")):
        text = source.read_text("utf-8").replace(INSTALLED, sys.executable)
        for name in FLOW_NAMES if "@" in source.name else [""]:
            (folder / source.name.replace("@", f"@{name}")).write_text(text)
    return [str(path) for path in folder.iterdir()]


def test_systemd_accepts_the_units(installed: list[str]) -> None:
    done = systemd_analyze("verify", "--man=no", *installed)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "k2flow" in line]


def test_systemd_rejects_an_invalid_unit(installed: list[str], tmp_path: Path) -> None:
    wrong = tmp_path / "k2flow-wrong.service"
    text = Path(next(path for path in installed if path.endswith("audit.service"))).read_text()
    wrong.write_text(text.replace("WatchdogSec", "WatchdogSeconds"))
    assert "Unknown key" in systemd_analyze("verify", "--man=no", str(wrong)).stderr


def test_units_are_confined(installed: list[str]) -> None:
    for path in (path for path in installed if path.endswith(".service")):
        done = systemd_analyze("security", "--offline=yes", f"--threshold={MAX_EXPOSURE}", "--no-pager", path)
        assert done.returncode == 0, done.stdout[-300:]


def test_target_has_all_units_and_waits_for_none() -> None:
    (target,) = [path.read_text("utf-8") for path in SYSTEMD.glob("*.target")]
    assert "DefaultDependencies=no" in target
    for unit in UNITS:
        assert unit.all("WantedBy") == ["k2flow.target"]
        assert unit.all("PartOf") == ["k2flow.target"]


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_command_exists(unit: Unit) -> None:
    program, *arguments = unit.command
    assert program == INSTALLED
    parse(["k2flow", *arguments])
    assert arguments[0] == "run" or parse_duration(arguments[arguments.index("--every") + 1]) >= 300


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_settings_and_secrets_are_known(unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2flow.config.secret_files._from_files", {})
    environment, credentials = secrets_drop_in()
    assert environment == {"K2FLOW_SECRETS_DIR": "%d"}
    for name in credentials:
        (tmp_path / name).write_text("REPLACE-ME\n")
    with as_a_process():
        for name in [name for name in os.environ if name.startswith(("K2FLOW_", "PYICEBERG_"))]:
            del os.environ[name]
        os.environ.update({**unit.environment, "K2FLOW_SECRETS_DIR": str(tmp_path)})
        settings = load_all_settings()
    assert str(settings.home) == "/var/lib/k2flow"
    assert "sasl.password" in settings.kafka
    assert (settings.metrics_port is None) == ("maintain" in unit.name)


def test_services_of_a_host_have_their_own_ports() -> None:
    ports = [unit.environment["K2FLOW_METRICS_PORT"] for unit in UNITS if "K2FLOW_METRICS_PORT" in unit.environment]
    assert len(set(ports)) == len(ports) == len(FLOW_NAMES) + 1


def test_credentials_are_files_of_their_names() -> None:
    _, credentials = secrets_drop_in()
    assert {Path(path).name for path in credentials.values()} == set(credentials)
    assert {str(Path(path).parent) for path in credentials.values()} == {"/etc/k2flow/secrets"}


def test_every_file_of_the_folder_is_used() -> None:
    used = {name for unit in UNITS for name in (unit.file, *unit.environment_files)}
    assert {path.name for path in SYSTEMD.iterdir()} == used | {"k2flow.target", "secrets.conf"}


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_unit_restarts_what_may_pass_by_itself(unit: Unit) -> None:
    never = unit.one("RestartPreventExitStatus").split()
    assert str(EXIT_FAILED) in never
    assert str(EXIT_UNAVAILABLE) not in never
    assert unit.one("Restart") in {"on-failure", "always"}
    assert unit.one("StartLimitIntervalSec") == "0"
    assert unit.one("Type") == "notify"
    assert int(unit.one("WatchdogSec")) <= int(unit.one("TimeoutStartSec"))  # it is extended by that
    if unit.flow:
        assert int(unit.one("TimeoutStopSec")) >= Settings.model_fields["stop_seconds"].default + 10


def test_units_share_their_confinement() -> None:
    confinements = {unit.text[unit.text.index("NoNewPrivileges") :] for unit in UNITS}
    assert len(confinements) == 1


# The protocol


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NotifySocket]:
    with NotifySocket(tmp_path if request.param == "file" else None) as received:
        yield received


def under_systemd(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def always(problem: str | None) -> Callable[[], str | None]:
    return lambda: problem


def test_readiness_health_and_stop_are_reported(manager: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> None:
    under_systemd(monkeypatch, manager.variables(watchdog_seconds=0.2))
    problem: list[str | None] = [None]
    missing: list[str | None] = ["binance: 0 of 3 processes read"]
    stopping = threading.Event()
    with report_to_systemd(lambda: problem[0], lambda: missing[0], stopping):
        assert not [name for name in VARIABLES if name in os.environ]  # child processes get none
        starting = manager.receive()
        assert starting == {"STATUS": missing[0], "WATCHDOG": "1", "EXTEND_TIMEOUT_USEC": "200000"}
        missing[0] = None
        assert manager.wait_for("READY") == {
            "STATUS": "ready",
            "WATCHDOG": "1",
            "EXTEND_TIMEOUT_USEC": "200000",
            "READY": "1",
        }
        assert "EXTEND_TIMEOUT_USEC" not in manager.receive()
        problem[0] = missing[0] = "a\nREADY=1"
        sick = manager.wait_for("STATUS", "a\\nREADY=1")
        assert sick == {"STATUS": "a\\nREADY=1"}
        assert manager.receive() == sick
        problem[0] = None
        assert manager.wait_for("WATCHDOG") == {**sick, "WATCHDOG": "1"}
        stopping.set()
        assert manager.wait_for("STOPPING") == {"STOPPING": "1", "STATUS": "stopping"}


def test_end_without_a_signal_is_a_stop_too(manager: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> None:
    under_systemd(monkeypatch, manager.variables(watchdog_seconds=60))
    with report_to_systemd(always(None), always(None), threading.Event()):
        pass
    assert manager.wait_for("STOPPING")


def test_watchdog_of_another_process_is_not_ours(manager: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> None:
    under_systemd(monkeypatch, {**manager.variables(watchdog_seconds=0.2), "WATCHDOG_PID": "1"})
    with report_to_systemd(always(None), always("not yet"), threading.Event()):
        assert manager.receive()["EXTEND_TIMEOUT_USEC"] == "30000000"


def test_long_status_fits_into_a_message(manager: NotifySocket, monkeypatch: pytest.MonkeyPatch) -> None:
    under_systemd(monkeypatch, manager.variables(watchdog_seconds=0.2))
    with report_to_systemd(always("é" * 10_000), always(None), threading.Event()):
        assert manager.receive()["STATUS"] == "é" * MAX_STATUS


def test_readiness_is_repeated_to_a_socket_that_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with NotifySocket(tmp_path) as gone:
        under_systemd(monkeypatch, gone.variables(watchdog_seconds=0.2))
    Path(gone.address).unlink()
    with report_to_systemd(always(None), always(None), threading.Event()), NotifySocket(tmp_path) as again:
        assert again.receive()["READY"] == "1"
        Path(again.address).unlink()
    assert not [thread for thread in threading.enumerate() if thread.name == "systemd"]


def test_full_socket_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with NotifySocket(tmp_path) as manager, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        under_systemd(monkeypatch, manager.variables(watchdog_seconds=0.02))
        flood.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                flood.sendto(b"STATUS=flood", manager.address)
        with report_to_systemd(always(None), always(None), threading.Event()):
            threading.Event().wait(0.1)
        assert "READY" not in manager.receive()


def test_nothing_runs_without_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    under_systemd(monkeypatch, {})
    stopping = threading.Event()
    with report_to_systemd(always(None), always(None), stopping):
        assert not [thread for thread in threading.enumerate() if thread.name == "systemd"]
    assert not stopping.is_set()


@pytest.mark.parametrize(
    ("command", "ready"),
    [
        (["maintain", "--every", "1h"], True),
        (["audit", "--every", "1h"], True),
        (["run", "kraken"], False),  # no broker answers, so it waits
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_report_to_systemd(command: Sequence[str], ready: bool, tmp_path: Path) -> None:
    with NotifySocket(tmp_path) as manager:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("K2FLOW_", "PYICEBERG_"))},
            **manager.variables(watchdog_seconds=2),
            "K2FLOW_HOME": str(tmp_path),
            "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        }
        with subprocess.Popen(
            [sys.executable, "-m", "k2flow", *command], env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                first = manager.receive(30)
                assert first.get("WATCHDOG") == "1", first
                assert (first.get("READY") == "1") == ready
                assert ready or re.fullmatch(r"kraken: 0 of \d processes read", first["STATUS"])
                process.send_signal(signal.SIGTERM)
                assert manager.wait_for("STOPPING", seconds=30)
                _, log = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == 0, log
