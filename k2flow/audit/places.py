"""Names messages by topic, partition and offset."""

from collections.abc import Iterable

from k2flow.audit.report import SAMPLES
from k2flow.inspection.partitions import TopicPartition
from k2flow.inspection.row_hashes import RowHashStore


def places(store: RowHashStore, partitions: Iterable[TopicPartition], sql: str) -> list[dict[str, object]]:
    """Return samples of the messages that a statement selects as (number, offset)."""
    by_number = {partition.number: partition for partition in partitions}
    return [by_number[number].at(offset) for number, offset in store.run(f"{sql} ORDER BY ALL LIMIT {SAMPLES}")]
