"""How long a call of a source lasts."""

import pytest

from k2flow.flow.schedule import BUSY_SECONDS, BUSY_TURN_SECONDS, Turns


def test_turns_of_all_processes_end_together() -> None:
    ends = [clock + Turns().seconds(0.0, clock) for clock in (1000.05, 1000.2, 1000.499)]
    assert ends == pytest.approx([1000.5] * 3)


def test_turns_are_short_while_a_process_catches_up() -> None:
    turns = Turns()
    turns.on_full_batch(7.0)
    assert turns.seconds(7.0 + BUSY_SECONDS - 0.01, 1000.1) == BUSY_TURN_SECONDS
    assert turns.seconds(7.0 + BUSY_SECONDS, 1000.1) == pytest.approx(0.4)
