"""The Kafka of a benchmark."""

from pathlib import Path

from k2flow.kafka.local import LocalKafka, free_port


def own_kafka(folder: Path) -> LocalKafka:
    """A Kafka that nobody else uses, with its data under `folder`: a context manager, which starts and stops it."""
    return LocalKafka(folder / "kafka", free_port())
