"""Reads an exchange's topic: one consumer per worker, one batch per trigger.

Delivery guarantee: each worker emits the messages of its partitions in order and without a gap, from the offsets at
which the tables end. After a crash the next start reads again whatever was emitted but not committed.

A batch is emitted at each trigger, or as soon as it reaches its cap of rows or bytes. The cap bounds memory: within an
epoch Bytewax has no back-pressure. `CommitSchedule` decides after which batches the tables commit.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from bytewax.inputs import DynamicSource, StatelessSourcePartition
from confluent_kafka import KafkaError as ConfluentError
from typing_extensions import override

from k2flow.errors import KafkaError
from k2flow.failpoints import Point, reach
from k2flow.flow.batch_buffer import BatchBuffer
from k2flow.flow.client_check import ClientCheck
from k2flow.flow.consumer_group import ConsumerGroup
from k2flow.flow.epoch_wait import AT_ONCE
from k2flow.flow.first_error import record_first_error
from k2flow.flow.log_check import LogCheck
from k2flow.flow.process import FlowProcess, consumer_of
from k2flow.flow.schedule import CommitSchedule
from k2flow.flow.stalls import StallWatch
from k2flow.flow.watermarks import WatermarkAlignment
from k2flow.kafka.consumer import BatchConsumer, FetchedMessages, check_event
from k2flow.kafka.damage import damage_error, split_damage
from k2flow.kafka.marks import marks_of, newest_marks
from k2flow.kafka.start_offsets import begin_offsets, first_offset
from k2flow.kafka.topic import BrokerDownError, find_watermarks, wait_for_watermarks
from k2flow.observability.clocks import KafkaClock
from k2flow.observability.metrics import STAGE, Stage
from k2flow.observability.tracing import begin_batch, end_batch
from k2flow.trades.messages import MessageBatch, empty_batch

log = logging.getLogger(__name__)
CONSUME_MESSAGES = 10_000  # at once, so that librdkafka's buffers are freed while a batch is gathered
POLL_SECONDS = 0.05
LOST_CONNECTION_SECONDS = 10.0  # between two warnings


class KafkaSource(DynamicSource[MessageBatch]):
    """Emits batches of MESSAGE_SCHEMA. Worker w of W reads the partitions p with p % W == w."""

    def __init__(self, process: FlowProcess) -> None:
        self._process = process

    @override
    @record_first_error
    def build(self, step_id: str, worker_index: int, worker_count: int) -> "KafkaSourcePartition":
        self._process.open(worker_count)
        reader = KafkaSourcePartition(self._process, worker_index, worker_count)
        self._process.reading = True
        STAGE.labels(self._process.exchange.name).set(Stage.READING)
        return reader


class KafkaSourcePartition(StatelessSourcePartition[MessageBatch]):
    """Reads the partitions of one worker. Raises KafkaError, LostOffsetsError, SettingsError."""

    def __init__(self, process: FlowProcess, worker: int, workers: int) -> None:
        self._process = process
        self._worker = worker
        self._workers = workers
        self._settings = process.exchange.settings
        self._topic = self._settings.topic
        self._until_caught_up = process.settings.until_caught_up
        properties = consumer_of(process.exchange, process.settings)
        self._messages = BatchConsumer(properties)
        self._group = ConsumerGroup(properties, self._topic)
        self._buffer = BatchBuffer(self._settings.batch_rows, self._settings.batch_mb << 20)
        self._alignment = WatermarkAlignment()
        self._clock = KafkaClock(process.exchange.name)
        self._stalls = StallWatch()
        self._warn_at = 0.0
        self._log_check = LogCheck(properties, self._topic, process.exchange.setting("accept_lost_offsets"))
        self._client_check = ClientCheck(process.settings.kafka, properties, self._topic)
        self._schedule = CommitSchedule(process.trigger_seconds, self._settings.commit_batches, time.time())
        self._epoch_wait = process.epoch_wait(worker)
        self._begun = self._finished = False
        self._damage: KafkaError | None = None  # raised once the rows before it are committed
        self._assign(process.session.topic.partitions, wait_for_watermarks)

    @override
    @record_first_error
    def next_batch(self) -> list[MessageBatch]:
        self._epoch_wait.restart()
        end_batch()
        if not self._schedule.uncommitted:
            self._group.report_committed(final=self._finished)
        if not self._begun:
            self._begun = True
            # For the first item Bytewax builds the owners' steps, and the committers: they fence other writers at once.
            return [empty_batch([], ends_checkpoint=False)]
        if self._damage and self._finished:
            raise self._damage
        if self._finished:
            reach(Point.SHUTDOWN)
            self._process.finished_reading = True
            raise StopIteration
        stopping = self._process.stop.is_set()
        if not stopping:
            self._add_new_partitions()
            self._log_check.check_when_due(self._buffer.marks)
            self._client_check.check_when_due(self._read_positions)
            self._fetch()
        if stopping or self._damage or self._caught_up():
            self._finished = True
            return self._emit(ends_checkpoint=True)
        if self._schedule.seconds_left(time.time()) <= 0:
            return self._emit(ends_checkpoint=True)
        if self._buffer.full:
            self._process.turns.on_full_batch(time.monotonic())
            return self._emit(ends_checkpoint=self._schedule.full_batch_ends_checkpoint)
        return []

    @override
    def next_awake(self) -> datetime:
        """Return that Bytewax calls `next_batch` once the epoch is over: `consume` does the waiting."""
        return AT_ONCE

    @override
    def close(self) -> None:
        self._messages.close()
        self._group.close()

    def _emit(self, ends_checkpoint: bool) -> list[MessageBatch]:
        """Return the next batch; none if no partition has advanced and no earlier batch awaits its commit."""
        if self._buffer.rows:
            begin_batch(worker=self._worker, messages=self._buffer.rows, bytes=self._buffer.nbytes)
        awaits_commit = ends_checkpoint and self._schedule.uncommitted
        batch = self._buffer.take(ends_checkpoint)
        self._schedule.on_emit(ends_checkpoint, time.time())
        if not batch.offsets and not awaits_commit:
            return []
        self._group.on_emit(batch.offsets)
        reach(Point.SOURCE_EMITTED)
        return [batch]

    def _assign(self, partitions: tuple[int, ...], find: Callable[..., dict[int, tuple[int, int]]]) -> None:
        """Begin this worker's share of `partitions`, except those it already reads."""
        mine = [p for p in partitions if p % self._workers == self._worker and p not in self._buffer.position]
        if not mine:
            return
        session = self._process.session
        starts = begin_offsets(session.topic, session.ledgers)
        accept, setting = self._settings.accept_lost_offsets, self._process.exchange.setting("accept_lost_offsets")
        offsets, ends = {}, {}
        for p, (low, high) in find(self._process.settings.kafka, self._topic, mine).items():
            offsets[p] = first_offset(session.topic, p, starts.get(p), low, high, accept, setting)
            ends[p] = high
        self._start_reading(offsets)
        marks = newest_marks(marks_of(session.topic, session.ledgers.values()))
        self._buffer.begin(offsets, ends if self._until_caught_up else {}, {p: marks[p] for p in mine if p in marks})
        log.info("worker %d reads %s from %s", self._worker, self._topic, offsets)

    def _add_new_partitions(self) -> None:
        if self._until_caught_up:
            return
        try:
            self._assign(self._group.discover_partitions(), find_watermarks)
        except BrokerDownError as error:
            log.warning("a new partition of %s was not added: %s", self._topic, error)

    def _fetch(self) -> None:
        """Fetch messages until the cap, the trigger, or the end of this worker's turn and a moment without any."""
        began = time.monotonic()
        turn = 0 if self._until_caught_up else self._process.turns.seconds(began, time.time())
        while not self._buffer.full and not self._process.stop.is_set():
            left = self._schedule.seconds_left(time.time())
            limit = min(CONSUME_MESSAGES, self._buffer.free_rows)
            fetched = self._stop_at_damage(self._messages.consume(limit, min(max(left, 0), POLL_SECONDS)))
            if fetched.lost_connection:
                self._on_lost_connection(fetched.lost_connection)
            for event in fetched.events:
                if event.code != ConfluentError._PARTITION_EOF:
                    check_event(event, self._topic, self._buffer.position.get(event.partition))
                    if event.offset >= 0:  # of the partition, not of the client
                        self._stalls.on_error(event.partition, event.text, time.monotonic())
                    self._log_check.on_error(self._buffer.marks())
            fetched_again = self._drop_doubted(fetched)
            if len(fetched) and not fetched_again:
                for p, time_ms in self._buffer.add(fetched).items():
                    if self._alignment.is_at_end(p):
                        self._clock.on_fresh_message(time_ms, time.monotonic())
                    self._alignment.on_message(p, time_ms, time.monotonic())
                    self._stalls.on_read(p, time.monotonic())
                    if self._buffer.at_end(p):
                        self._alignment.on_end(p)
            for event in fetched.events:
                if event.code == ConfluentError._PARTITION_EOF and event.partition not in fetched_again:
                    self._buffer.skip_to(event.partition, event.offset)
                    self._alignment.on_end(event.partition)
                    self._stalls.on_pause(event.partition)
            self._align()
            self._warn_of_stalls()
            idle = len(fetched) + len(fetched.events) < limit
            if idle:
                self._client_check.on_idle_fetch()
            turn_is_over = idle and time.monotonic() - began >= turn
            if self._damage or turn_is_over or left <= 0 or self._caught_up():
                return

    def _read_positions(self) -> dict[int, int]:
        """Return the next offset of each partition that is read now: neither paused nor at its given end."""
        return {
            p: at
            for p, at in self._buffer.position.items()
            if not (self._buffer.at_end(p) or self._alignment.is_paused(p))
        }

    def _on_lost_connection(self, text: str) -> None:
        """Doubt what comes from now on; log one of librdkafka's lines, since it has twenty a second."""
        self._log_check.on_error(self._buffer.marks())
        if time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + LOST_CONNECTION_SECONDS
            log.warning("%s: %s; librdkafka keeps trying", self._topic, text)

    def _drop_doubted(self, fetched: FetchedMessages) -> set[int]:
        """If what was fetched is in doubt, check the log that it comes from, and fetch it again from the positions.

        The messages are of the log from before and after the doubt. Return the partitions that are fetched again.
        """
        partitions = set(fetched.leader_epoch)
        if not self._log_check.doubted(partitions):
            return set()
        self._log_check.verify(partitions, self._buffer.marks())
        self._messages.unassign(self._topic, partitions)
        # Not `_start_reading`: a partition that stays in doubt must count as stalled.
        self._messages.assign(self._topic, {p: self._buffer.position[p] for p in partitions})
        return partitions

    def _align(self) -> None:
        """Pause partitions that are far ahead of the others in time, and resume them later."""
        pause, resume = self._alignment.decide(time.monotonic())
        if pause:
            self._stop_reading(pause)
            log.debug("worker %d pauses partitions %s", self._worker, sorted(pause))
        if resume:
            self._start_reading({p: self._buffer.position[p] for p in resume})

    def _start_reading(self, offsets: Mapping[int, int]) -> None:
        self._messages.assign(self._topic, offsets)
        for p in offsets:
            self._stalls.on_read(p, time.monotonic())

    def _stop_reading(self, partitions: Iterable[int]) -> None:
        self._messages.unassign(self._topic, partitions)
        for p in partitions:
            self._stalls.on_pause(p)

    def _stop_at_damage(self, fetched: FetchedMessages) -> FetchedMessages:
        """Return what comes before the first damage of each partition; nothing behind it is ever read."""
        fetched, damages = split_damage(
            fetched, self._buffer.position, lambda p: self._messages.log_end(self._topic, p)
        )
        if damages:
            self._damage = damage_error(self._topic, damages, self._process.exchange.setting("accept_lost_offsets"))
            self._stop_reading([each.partition for each in damages])
            for each in damages:
                self._buffer.drop_from(each.partition, each.offset)
        return fetched

    def _warn_of_stalls(self) -> None:
        for p, seconds, refusal in self._stalls.overdue(time.monotonic()):
            text = "%s[%d]: Kafka has not given the message at offset %d for %.0f s (%s); nothing is skipped"
            log.warning(text, self._topic, p, self._buffer.position[p], seconds, refusal or "it gives no reason")

    def _caught_up(self) -> bool:
        return self._until_caught_up and self._buffer.all_at_end
