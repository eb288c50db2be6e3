"""Reads an exchange's topic: one consumer for each worker, one batch for each trigger.

Delivery guarantee: each worker emits the messages of its partitions in order and without a gap from the offsets at
which the tables end; what it has emitted and the tables have not committed when it dies, the next start reads again.

A batch is emitted at each trigger (moments that are whole multiples of the trigger, so that all workers emit together)
or as soon as it has grown to the cap of rows or bytes, whichever comes first. The cap is what bounds memory: within an
epoch Bytewax has no back-pressure. The tables commit at each trigger, and while the flow catches up, when one full
batch follows the other, after every `commit_batches` of them: four commits cost as much as a tenth of a batch. No batch
waits longer than UNCOMMITTED_SECONDS for that, whatever the trigger: maintenance removes old files that nothing names.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka import KafkaError as ConfluentError

from k2flow.config.settings import KAFKA_PREFIX
from k2flow.errors import KafkaError, LostOffsetsError, SettingsError
from k2flow.failpoints import Point, reach
from k2flow.flow.backoff import EpochBackoff
from k2flow.flow.first_error import record_first_error
from k2flow.flow.process import FlowProcess
from k2flow.flow.watermarks import WatermarkAlignment
from k2flow.kafka.consumer import BatchConsumer, Event, Fetched
from k2flow.kafka.properties import consumer_properties
from k2flow.kafka.topic import BrokerDownError, begin_offsets, first_offset, wait_for_watermarks, watermarks_now
from k2flow.observability.metrics import STAGE, Stage
from k2flow.observability.tracing import begin_batch, end_batch
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch, timestamps

log = logging.getLogger(__name__)

CONSUME_MESSAGES = 10_000  # at once, so that librdkafka's buffers are freed while a batch is gathered
POLL_SECONDS = 0.05
NEW_PARTITIONS_SECONDS = 30.0
GROUP_SECONDS = 2.0
UNCOMMITTED_SECONDS = 10.0


class KafkaSource(DynamicSource[MessageBatch]):
    """Emits `MessageBatch`s of MESSAGE_SCHEMA; worker w of W reads the partitions p with p % W == w."""

    def __init__(self, process: FlowProcess) -> None:
        self._process = process

    @record_first_error
    def build(self, step_id: str, worker_index: int, worker_count: int) -> "KafkaSourcePartition":
        self._process.open(worker_count)
        reader = KafkaSourcePartition(self._process, worker_index, worker_count)
        self._process.reading = True
        STAGE.labels(self._process.exchange.name).set(Stage.READING)
        return reader


class KafkaSourcePartition(StatelessSourcePartition[MessageBatch]):
    """The partitions of one worker. Raises KafkaError, LostOffsetsError, SettingsError."""

    def __init__(self, process: FlowProcess, worker: int, workers: int) -> None:
        self._process = process
        self._worker = worker
        self._workers = workers
        self._session = process.session
        self._settings = process.exchange.settings
        self._accept_setting = process.exchange.setting("accept_lost_offsets")
        properties = consumer_properties(process.settings.kafka, f"k2flow-{process.exchange.name}")
        self._messages = BatchConsumer(properties)
        self._group = _open_group(properties)
        self._first: dict[int, int] = {}  # of the batch that is being gathered
        self._position: dict[int, int] = {}  # next offset to read
        self._alignment = WatermarkAlignment()
        self._end: dict[int, int] = {}  # where to stop, if the flow stops when it has caught up
        self._parts: list[tuple[pa.RecordBatch, np.ndarray, np.ndarray]] = []
        self._rows = 0
        self._bytes = 0
        self._emitted: dict[int, int] = {}  # since the consumer group was told
        self._uncommitted = 0  # batches since a commit was last asked for
        self._begun = self._finished = False
        self._awake_at = datetime.now(UTC)
        self._pacing = EpochBackoff()
        self._due = self._next_trigger()
        self._look_for_partitions_at = 0.0
        self._assign(process.session.topic.partitions, wait_for_watermarks)

    @record_first_error
    def next_batch(self) -> list[MessageBatch]:
        self._awake_at = datetime.now(UTC)  # at once: the waiting is done in `consume`, without the interpreter's lock
        self._pacing.back(self._awake_at)
        end_batch()
        self._report_committed()
        if not self._begun:
            self._begun = True
            # Bytewax builds the committers for the first item: they fence others off at once.
            return [_nothing([], ends_checkpoint=False)]
        if self._finished:
            reach(Point.SHUTDOWN)
            self._process.finished_reading = True
            raise StopIteration
        stopping = self._process.stop.is_set()
        if not stopping:
            self._find_new_partitions()
            self._fetch()
        if stopping or self._caught_up():
            self._finished = True
            return self._emit(ends_checkpoint=True)
        if time.time() >= self._due:
            return self._emit(ends_checkpoint=True)
        if self._full():
            return self._emit(ends_checkpoint=self._uncommitted + 1 >= self._settings.commit_batches)
        return []

    def _emit(self, ends_checkpoint: bool) -> list[MessageBatch]:
        if self._rows:
            begin_batch(worker=self._worker, messages=self._rows, bytes=self._bytes)
        slices = self._take(ends_checkpoint)
        if ends_checkpoint:
            self._uncommitted, self._due = 0, self._next_trigger()
        else:
            self._uncommitted += 1
            self._due = min(self._due, time.time() + UNCOMMITTED_SECONDS)
        self._awake_at += self._pacing.leave(datetime.now(UTC))
        return slices

    def next_awake(self) -> datetime | None:
        """When Bytewax looks at this source again; it counts from when it last called `next_batch`.

        While an epoch is not over it does not call `next_batch`, but once this moment has come it asks whether it
        may, as fast as it can: beside other processes, most of a core.
        """
        return self._awake_at

    def close(self) -> None:
        self._messages.close()
        self._group.close()

    def _assign(
        self, partitions: tuple[int, ...], ends: Callable[[Consumer, str, int], tuple[int, int]] = watermarks_now
    ) -> None:
        """Begins the partitions of this worker among `partitions` that it does not read yet."""
        mine = [p for p in partitions if p % self._workers == self._worker and p not in self._position]
        starts = begin_offsets(self._session.topic, self._session.ledgers)
        begins: dict[int, int] = {}
        for p in mine:
            low, high = ends(self._group, self._settings.topic, p)
            begins[p] = first_offset(
                self._session.topic,
                p,
                starts.get(p),
                low,
                high,
                self._settings.accept_lost_offsets,
                self._accept_setting,
            )
            if self._process.settings.until_caught_up:
                self._end[p] = high
        if mine:
            topic = self._settings.topic
            self._messages.assign(topic, begins)
            self._position |= begins
            self._first |= begins
            log.info("worker %d reads %s from %s", self._worker, topic, begins)

    def _find_new_partitions(self) -> None:
        if self._process.settings.until_caught_up or time.monotonic() < self._look_for_partitions_at:
            return
        if self._look_for_partitions_at:
            try:
                found = self._group.list_topics(self._settings.topic, timeout=1).topics[self._settings.topic]
                self._assign(tuple(found.partitions))
            except (KafkaException, BrokerDownError) as error:
                log.warning("not looked for new partitions of %s: %s", self._settings.topic, error)
        self._look_for_partitions_at = time.monotonic() + NEW_PARTITIONS_SECONDS

    def _fetch(self) -> None:
        """Takes messages until the cap, the trigger or the moment when none come."""
        while not self._full() and not self._process.stop.is_set():
            left = self._due - time.time()
            wanted = min(CONSUME_MESSAGES, self._settings.batch_rows - self._rows)
            got = self._messages.consume(wanted, min(max(left, 0), POLL_SECONDS))
            if len(got):
                self._add(got)
            for event in got.events:
                self._handle(event)
            self._align()
            if len(got) + len(got.events) < wanted or left <= 0 or self._caught_up():
                return

    def _align(self) -> None:
        """Sets partitions aside that are far ahead of the others in time, and takes them up again."""
        topic = self._settings.topic
        aside, again = self._alignment.decide(time.monotonic())
        if aside:
            self._messages.unassign(topic, aside)
            log.debug("worker %d sets partitions %s aside", self._worker, sorted(aside))
        if again:
            self._messages.assign(topic, {p: self._position[p] for p in again})

    def _add(self, got: Fetched) -> None:
        columns = [got.key, got.value, timestamps(got.timestamp_ms)]
        rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
        partition, offset, time_ms = got.partition, got.offset, got.timestamp_ms
        if self._end:
            keep = offset < _by_partition(self._end, partition)
            if not keep.all():
                rows, partition, offset, time_ms = (
                    rows.filter(pa.array(keep)),
                    partition[keep],
                    offset[keep],
                    time_ms[keep],
                )
        for p in np.unique(partition).tolist():
            last = int(np.flatnonzero(partition == p)[-1])
            self._position[p] = int(offset[last]) + 1
            self._alignment.read(p, int(time_ms[last]), time.monotonic())
            if self._position[p] == self._end.get(p):
                self._alignment.ended(p)
        if rows.num_rows == 0:
            return
        self._parts.append((rows, partition, offset))
        self._rows += rows.num_rows
        self._bytes += rows.nbytes

    def _handle(self, event: Event) -> None:
        code, p = event.code, event.partition
        if code == ConfluentError._PARTITION_EOF:
            # The position goes past markers of transactions and compacted offsets, of which no message tells.
            end = self._end.get(p, event.offset)
            self._position[p] = max(self._position[p], min(event.offset, end))
            self._alignment.ended(p)
        elif code in (ConfluentError._AUTO_OFFSET_RESET, ConfluentError.OFFSET_OUT_OF_RANGE):
            raise LostOffsetsError(
                f"{self._settings.topic}[{p}]: Kafka no longer has offset {self._position.get(p)}, which is the "
                f"next to read ({event.text}); start again to see what is lost"
            )
        elif code in (ConfluentError.UNKNOWN_TOPIC_OR_PART, ConfluentError._UNKNOWN_PARTITION):
            raise KafkaError(f"{self._settings.topic}[{p}]: no longer there ({event.text})")
        elif code in (
            ConfluentError._FATAL,
            ConfluentError.TOPIC_AUTHORIZATION_FAILED,
            ConfluentError.GROUP_AUTHORIZATION_FAILED,
        ):
            raise KafkaError(f"{self._settings.topic}: {event.text}")
        else:
            log.warning("%s: %s; librdkafka goes on trying", self._settings.topic, event.text)

    def _full(self) -> bool:
        return self._rows >= self._settings.batch_rows or self._bytes >= self._settings.batch_mb << 20

    def _caught_up(self) -> bool:
        return self._process.settings.until_caught_up and all(self._position[p] >= e for p, e in self._end.items())

    def _next_trigger(self) -> float:
        seconds = self._process.trigger_seconds
        return (math.floor(time.time() / seconds) + 1) * seconds

    def _take(self, ends_checkpoint: bool) -> list[MessageBatch]:
        """What was gathered, as one batch; nothing if no partition has advanced and none awaits `commit`."""
        offsets = [(p, self._first[p], end) for p, end in self._position.items() if end > self._first[p]]
        parts, self._parts, self._rows, self._bytes = self._parts, [], 0, 0
        if not offsets and not (ends_checkpoint and self._uncommitted):
            return []
        self._first = dict(self._position)
        self._emitted |= {p: end for p, _, end in offsets}
        reach(Point.SOURCE_EMITTED)
        if not parts:
            return [_nothing(offsets, ends_checkpoint)]
        rows = pa.concat_batches([rows for rows, _, _ in parts])
        partition = np.concatenate([partition for _, partition, _ in parts])
        return [
            MessageBatch(rows, partition, np.concatenate([offset for _, _, offset in parts]), offsets, ends_checkpoint)
        ]

    def _report_committed(self) -> None:
        """Tells Kafka's consumer group of what is committed: all that was emitted, once the tables were told to.

        Only for the tools that watch a group's lag: the flow itself begins at the tables' own offsets.
        """
        if self._uncommitted or not self._emitted:
            return
        offsets = [TopicPartition(self._settings.topic, p, next_) for p, next_ in self._emitted.items()]
        self._emitted = {}
        try:
            if self._finished:  # a commit that is waited for would wait most of a minute for a broker that is down
                self._group.list_topics(self._settings.topic, timeout=GROUP_SECONDS)
            self._group.commit(offsets=offsets, asynchronous=not self._finished)
        except KafkaException as error:
            log.warning("the consumer group was not told of the committed offsets: %s", error.args[0].str())


def _open_group(properties: Mapping[str, str]) -> Consumer:
    """A client for all but the messages: watermarks, new partitions, the group's offsets."""
    try:
        return Consumer({**properties, "log_level": "0"})  # what is wrong with the brokers the other client says too
    except KafkaException as error:
        raise SettingsError(f"a {KAFKA_PREFIX}* setting is wrong: {error.args[0].str()}") from error


def _nothing(offsets: Sequence[tuple[int, int, int]], ends_checkpoint: bool) -> MessageBatch:
    """No message, of `offsets`."""
    none = pa.RecordBatch.from_arrays([pa.array([], f.type) for f in MESSAGE_SCHEMA], schema=MESSAGE_SCHEMA)
    return MessageBatch(none, np.zeros(0, np.int32), np.zeros(0, np.int64), offsets, ends_checkpoint)


def _by_partition(values: dict[int, int], partition: np.ndarray) -> np.ndarray:
    table = np.zeros(max(values) + 1, np.int64)
    table[list(values)] = list(values.values())
    result: np.ndarray = table[partition]
    return result
