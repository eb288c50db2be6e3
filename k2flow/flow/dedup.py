"""The deduplication as a stateful Bytewax step, one state for each owner of keys."""

from bytewax.operators import StatefulBatchLogic
from typing_extensions import override

from k2flow.failpoints import Point, reach
from k2flow.flow.first_error import record_first_error
from k2flow.flow.process import FlowProcess
from k2flow.iceberg.committable import Committable
from k2flow.trades.deduplicate import Deduplicator, OwnedTrades


class DedupStep(StatefulBatchLogic[OwnedTrades, Committable, None]):
    """One owner's `Deduplicator`, which opens at its first item."""

    def __init__(self, process: FlowProcess) -> None:
        self._process = process
        self._deduplicator: Deduplicator | None = None

    @override
    @record_first_error
    def on_batch(self, values: list[OwnedTrades]) -> tuple[list[Committable], bool]:
        if self._deduplicator is None:
            self._deduplicator = self._process.pipeline.deduplicator(values[0].owner)
        committable = self._deduplicator.process(values)
        reach(Point.GOLD_WRITTEN)
        return [committable], StatefulBatchLogic.RETAIN

    @override
    def snapshot(self) -> None:
        if self._deduplicator is not None:
            self._deduplicator.on_epoch_end()
