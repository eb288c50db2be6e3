"""A topic and tables for each test."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce
from tests.integration.harness import Lake


@pytest.fixture
def new_lake(kafka: LocalKafka, tmp_path: Path) -> Callable[..., Lake]:
    """Return a function that creates a new topic and a `Lake` for it."""

    def make(exchange: str = "binance", partitions: int = 3, home: str = "lake") -> Lake:
        topic = f"{exchange}.{uuid.uuid4().hex}"
        kafka.start({topic: partitions})
        return Lake(exchange, topic, tmp_path / home, kafka.bootstrap)

    return make


def fill(lake: Lake, **options: object) -> Manifest:
    """Produce simulated trades into a lake's topic."""
    code = find_exchange(lake.exchange).code
    return produce(code, lake.topic, {"bootstrap.servers": lake.bootstrap}, ProduceOptions(**options))  # type: ignore[arg-type]
