"""The metrics of a flow's processes, which each writes into files of a common folder."""

import struct
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed
from typing_extensions import override

from k2flow.observability.metrics import Stage


class ProcessCounts(Collector):
    """The processes' metrics, added up.

    A read is repeated while a process creates or removes a file: Prometheus' client fails on a half-written one.
    """

    def __init__(self, folder: str) -> None:
        self._files = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]

    @override
    def collect(self) -> Iterable[Metric]:
        retrying = Retrying(
            retry=retry_if_exception_type((struct.error, ValueError, OSError)),
            wait=wait_fixed(0.02),
            stop=stop_after_attempt(50),
            reraise=True,
        )
        metrics: Iterable[Metric] = retrying(lambda: list(self._files.collect()))  # type: ignore[no-untyped-call]
        return metrics


def process_stage(folder: str, exchange: str, pid: int) -> Stage:
    """Return the stage that a process has reported in the metrics of `folder`."""
    registry = CollectorRegistry()
    registry.register(ProcessCounts(folder))
    value = registry.get_sample_value("k2flow_process_stage", {"exchange": exchange, "pid": str(pid)})
    return Stage(int(value or 0))
