"""Keys that Bytewax routes to a chosen worker."""

import threading
from collections.abc import Iterator

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.operators import StatefulBatchLogic
from bytewax.testing import TestingSink, cluster_main

from k2flow.compat.bytewax import worker_key


class Once(StatelessSourcePartition[tuple[str, int]]):
    def __init__(self, workers: int) -> None:
        self._batches: Iterator[list[tuple[str, int]]] = iter([[(worker_key(w, workers), w) for w in range(workers)]])

    def next_batch(self) -> list[tuple[str, int]]:
        return next(self._batches)


class Source(DynamicSource[tuple[str, int]]):
    def __init__(self) -> None:
        self.worker_of_thread: dict[int, int] = {}

    def build(self, step_id: str, worker_index: int, worker_count: int) -> Once:
        self.worker_of_thread[threading.get_native_id()] = worker_index
        return Once(worker_count)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_bytewax_sends_each_key_to_its_worker(workers: int) -> None:
    source = Source()
    found: list[tuple[str, tuple[int, int]]] = []

    class Where(StatefulBatchLogic[int, tuple[int, int], None]):
        def on_batch(self, values: list[int]) -> tuple[list[tuple[int, int]], bool]:
            return [(v, source.worker_of_thread[threading.get_native_id()]) for v in values], False

        def snapshot(self) -> None:
            return None

    flow = Dataflow("routing")
    items = op.input("in", flow, source)
    op.output("out", op.stateful_batch("where", items, lambda _: Where()), TestingSink(found))
    cluster_main(flow, [], 0, worker_count_per_proc=workers)
    assert len(found) == workers * workers
    assert all(wanted == got for _, (wanted, got) in found)
