"""Every benchmark goes through, at its smallest; only that, for the figures mean nothing at that size."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from bench import broker
from bench.smoke import BENCHMARKS, go_through, lacks, names
from k2flow.kafka.local import LocalKafka

pytestmark = pytest.mark.integration


@pytest.fixture
def one_kafka(kafka: LocalKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Kafka of the tests is that of the benchmark, which finds it without the topics of any other."""
    monkeypatch.setattr(broker, "LocalKafka", lambda home, port: lent(kafka))


@contextmanager
def lent(kafka: LocalKafka) -> Iterator[LocalKafka]:
    """The topics that are made go again."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    before = topics(admin)
    yield kafka
    made = topics(admin) - before
    for future in admin.delete_topics(list(made)).values():
        future.result(30)
    deadline = time.monotonic() + 30
    while topics(admin) & made:  # they are deleted before the broker says so
        assert time.monotonic() < deadline
        time.sleep(0.05)


def topics(admin: AdminClient) -> set[str]:
    return {name for name in admin.list_topics(timeout=30).topics if not name.startswith("__")}


@pytest.mark.usefixtures("one_kafka")
@pytest.mark.parametrize(("benchmark", "small"), BENCHMARKS, ids=names())
def test_benchmark(benchmark: Callable[..., None], small: dict[str, Any]) -> None:
    if absent := lacks(benchmark):
        pytest.skip(f"no {absent} here")
    go_through(benchmark, small)
