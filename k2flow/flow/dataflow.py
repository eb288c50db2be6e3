"""The dataflow of an exchange, as Bytewax sees it.

    topic ─► source ─► write ─┬─► committables ────────────────────────┬─► one committer per table
                              └─► Gold's rows, by owner ─► deduplicate ─┘

Items are whole batches, see `trades.pipeline`. The worker that has the rows writes the data files; committers only
get their names.
"""

import time
from datetime import datetime

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.operators import StatefulBatchLogic
from typing_extensions import override

from k2flow.compat.bytewax import worker_key
from k2flow.exchange import Exchange
from k2flow.failpoints import Point, reach
from k2flow.flow.epoch_wait import AT_ONCE, EpochWait
from k2flow.flow.first_error import record_first_error
from k2flow.flow.process import FlowProcess
from k2flow.flow.runtime import install_runner
from k2flow.flow.sink import TableSink
from k2flow.flow.source import KafkaSource
from k2flow.iceberg.committable import Committable
from k2flow.trades.deduplicate import Deduplicator, OwnedTrades
from k2flow.trades.messages import MessageBatch

Written = tuple[list[Committable], list[OwnedTrades]]


def build(exchange: Exchange) -> Dataflow:
    """Return the dataflow of `exchange`, for `python -m bytewax.run flows.<exchange>`. Does no I/O until it runs."""
    process = FlowProcess(exchange)

    @record_first_error
    def write(batch: MessageBatch) -> Written:
        return process.pipeline.write(batch)

    flow = Dataflow(f"k2flow_{exchange.name}")
    messages = op.input("kafka", flow, KafkaSource(process))
    written = op.map("write", messages, write)
    committables = op.flat_map("committables", written, lambda pair: [(each.table, each) for each in pair[0]])
    routed = op.flat_map(
        "route", written, lambda pair: [(worker_key(each.owner, each.owners), each) for each in pair[1]]
    )
    deduplicated = op.stateful_batch("dedup", routed, lambda _: DedupStep(process))
    gold = op.map("gold", deduplicated, lambda item: (item[1].table, item[1]))
    op.output("tables", op.merge("written", committables, gold), TableSink(process))
    install_runner(process)
    return flow


class DedupStep(StatefulBatchLogic[OwnedTrades, Committable, None]):
    """One owner's `Deduplicator`, which opens at its first item.

    While the owner's worker waits for the end of an epoch, it sleeps in this step, see `EpochWait`.
    """

    def __init__(self, process: FlowProcess) -> None:
        self._process = process
        self._deduplicator: Deduplicator | None = None
        self._epoch_wait = EpochWait()

    @override
    @record_first_error
    def on_batch(self, values: list[OwnedTrades]) -> tuple[list[Committable], bool]:
        self._epoch_wait = self._process.epoch_wait(values[0].owner)
        self._epoch_wait.restart()
        items = [each for each in values if each.rows.num_rows or each.ends_checkpoint]
        if not items:  # the first one only begins this step
            return [], StatefulBatchLogic.RETAIN
        if self._deduplicator is None:
            self._deduplicator = self._process.pipeline.deduplicator(items[0].owner)
        if not all(each.ends_checkpoint for each in items):
            self._process.turns.on_full_batch(time.monotonic())
        committable = self._deduplicator.process(items)
        reach(Point.GOLD_WRITTEN)
        return [committable], StatefulBatchLogic.RETAIN

    @override
    def on_notify(self) -> tuple[list[Committable], bool]:
        self._epoch_wait.sleep()
        return [], StatefulBatchLogic.RETAIN

    @override
    def notify_at(self) -> datetime:
        return AT_ONCE

    @override
    def snapshot(self) -> None:
        if self._deduplicator is not None:
            self._deduplicator.on_epoch_end()
