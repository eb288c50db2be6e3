"""A worker sleeps between Bytewax's questions whether the epoch is over, and works at once when it is."""

import time

import pytest

from k2flow.flow.epoch_wait import AT_ONCE, EAGER_QUESTIONS, SLEEP_SECONDS, EpochWait


def seconds_of(wait: EpochWait, questions: int) -> float:
    """Return the seconds that a number of questions takes."""
    began = time.monotonic()
    for _ in range(questions):
        wait.sleep()
    return time.monotonic() - began


def test_worker_sleeps_from_an_item_until_the_source_is_called() -> None:
    wait = EpochWait()
    assert wait.next_sleep() is None
    wait.begin()
    seconds_of(wait, EAGER_QUESTIONS)
    assert wait.next_sleep() == AT_ONCE
    assert seconds_of(wait, 20) >= 20 * SLEEP_SECONDS
    wait.end()
    assert wait.next_sleep() is None


def test_first_questions_of_each_epoch_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    wait = EpochWait()
    for epoch in range(1, 3):
        wait.begin()
        seconds_of(wait, EAGER_QUESTIONS + 1)
        assert slept == [SLEEP_SECONDS] * epoch
        wait.end()


def test_question_after_the_end_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    wait = EpochWait()
    wait.begin()
    wait.end()
    seconds_of(wait, 2 * EAGER_QUESTIONS)
    assert slept == []
