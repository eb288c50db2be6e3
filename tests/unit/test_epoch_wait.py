"""A worker sleeps between Bytewax's questions whether the epoch is over, and works at once when it is."""

import time

import pytest

from k2flow.flow.epoch_wait import EAGER_QUESTIONS, LONGEST_SLEEP_SECONDS, SHORTEST_SLEEP_SECONDS, EpochWait


class Clock:
    """A clock that only sleeping advances. It keeps how long each sleep was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 0.0, list[float]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def ask(wait: EpochWait, questions: int) -> None:
    for _ in range(questions):
        wait.sleep()


def test_first_questions_after_each_work_are_asked_at_once(clock: Clock) -> None:
    wait = EpochWait()
    for work in range(1, 4):
        wait.restart()
        ask(wait, EAGER_QUESTIONS)
        assert len(clock.slept) == work - 1
        ask(wait, 1)
        assert clock.slept == [SHORTEST_SLEEP_SECONDS] * work


def test_worker_without_an_item_sleeps_too(clock: Clock) -> None:
    wait = EpochWait()
    ask(wait, EAGER_QUESTIONS + 20)
    assert len(clock.slept) == 20


def test_sleeps_grow_with_the_wait_up_to_a_limit(clock: Clock) -> None:
    wait = EpochWait()
    ask(wait, EAGER_QUESTIONS + 1000)
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[-1] == LONGEST_SLEEP_SECONDS
    assert clock.now < 1000 * LONGEST_SLEEP_SECONDS


def test_long_wait_asks_few_questions(clock: Clock) -> None:
    wait = EpochWait()
    while clock.now < 1.0:
        wait.sleep()
    assert len(clock.slept) < 300  # a question costs about a tenth of a millisecond


def test_wait_ends_at_most_a_tenth_too_late(clock: Clock) -> None:
    wait, over = EpochWait(), 0.5
    while clock.now < over:
        wait.sleep()
    assert clock.now <= over * 1.1
