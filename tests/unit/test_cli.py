"""What the commands share: durations, repetition, errors, and the ages in `k2flow status`."""

import threading

import pytest
import typer

from k2flow.cli.options import parse_duration
from k2flow.cli.process import every, exit_on_error
from k2flow.cli.status import _ago, _behind
from k2flow.errors import QueryError
from k2flow.status.model import LayerStatus, Level


@pytest.mark.parametrize(
    ("value", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), (" 7d ", 604_800), ("0s", 0), (3600.0, 3600)]
)
def test_duration_in_seconds(value: str | float, seconds: float) -> None:
    assert parse_duration(value) == seconds


@pytest.mark.parametrize("text", ["5", "m", "-5m", "5 m", "1h30m", "5w", ""])
def test_invalid_duration_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a duration: give a number and s, m, h or d"):
        parse_duration(text)


def test_every_repeats_until_stopped() -> None:
    stop, turns = threading.Event(), 0
    for _ in every(0.001, stop):
        turns += 1
        if turns == 3:
            stop.set()
    assert turns == 3


def test_every_runs_once_if_it_is_stopped_during_the_first_turn() -> None:
    stop = threading.Event()
    stop.set()
    assert list(every(60, stop)) == [None]


def test_error_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, exit_on_error(2, "audit incomplete: "):
        raise QueryError("no such table")
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "k2flow: error: audit incomplete: no such table\n")


@pytest.mark.parametrize(("value", "passes"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_debug_lets_the_error_pass(monkeypatch: pytest.MonkeyPatch, value: str, passes: bool) -> None:
    monkeypatch.setenv("K2FLOW_DEBUG", value)
    with pytest.raises(QueryError if passes else SystemExit), exit_on_error(1):
        raise QueryError("no such table")


@pytest.mark.parametrize(
    ("seconds", "level", "text"),
    [
        (None, Level.UNKNOWN, "unknown"),
        (0.0, Level.OK, "0.0 s"),
        (4.26, Level.OK, "4.3 s"),
        (119.0, Level.LATE, "119.0 s, late"),
        (150.0, Level.OK, "2 minutes"),
        (7_384.0, Level.STALE, "2 hours and 3 minutes, stale"),
    ],
)
def test_lag_is_exact_while_it_is_short(seconds: float | None, level: Level, text: str) -> None:
    layer = LayerStatus(
        table="t",
        level=level,
        lag=1,
        lag_seconds=seconds,
        messages=1,
        rows=1,
        messages_per_second=None,
        rows_per_second=None,
        rate_over_seconds=None,
        committed_at=None,
        partitions=(),
    )
    assert _behind(layer) == text


def test_age_of_a_commit_is_never_in_the_future() -> None:
    assert _ago(0, 150_000) == "2 minutes ago"
    assert _ago(5_000, 0) == "now"
